"""Dropout of whole latents: what is dropped reads nothing, which saves its time too."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.random_draws import RepeatableDraws
from perceiver_core.registry import register


@register
class DropLatents(nn.Module):
    """In training a part of the latents only, drawn anew each time, the same for all samples.

    Of m latents, (1 - rate) m are left, rounded down, one at least, in their order.

    Args:
        rate: the share of latents that is dropped.
        generator: draws which; PyTorch's own unless given. It is not saved.

    Raises:
        ValueError: a rate outside [0, 1).

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> encoder = pc.Encoder(10, num_latents=8, dim=32, depth=1, latent_dropout=pc.DropLatents(rate=0.25))
        >>> x = torch.randn(2, 50, 10)
        >>> encoder.train()(x).shape, encoder.eval()(x).shape
        (torch.Size([2, 6, 32]), torch.Size([2, 8, 32]))

    Reference: Hinton et al. 2012, on whole vectors; kklemon/FlashPerceiver drops latents so.
    """

    def __init__(self, rate: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        checks.probability(rate=rate)
        self.rate, self.generator = rate, generator
        self._draws = RepeatableDraws()

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b kept d"]:
        """Some of the latents in training, all otherwise."""
        if not self.training or not self.rate:
            return latents
        order = torch.empty(latents.shape[1], device=latents.device).normal_(
            generator=self._draws.generator(self.generator)
        )
        kept = order.topk(max(1, checks.part_of(latents.shape[1], 1 - self.rate))).indices
        return latents[:, kept.sort().values]
