"""Dropout of whole latents. Dropped latents are not processed, so dropout also reduces compute."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers.random_draws import RepeatableDraws
from perceiver_core.registry import register


@register
class DropLatents(nn.Module):
    """Dropout of whole latents: in training, each forward pass keeps a random subset, the same for all samples.

    Of m latents, (1 - rate) m are kept, rounded down, but at least one. Their order and their values do not change.

    Args:
        rate: Fraction of the latents to drop, in [0, 1).
        generator: Random generator; None for PyTorch's default generator. The generator is not saved with the model.

    Raises:
        ValueError: If the rate is outside [0, 1).

    Example:
        >>> encoder = pc.Encoder(10, num_latents=8, dim=32, depth=1, latent_dropout=pc.DropLatents(rate=0.25))
        >>> x = torch.randn(2, 50, 10)
        >>> encoder.train()(x).shape, encoder.eval()(x).shape
        (torch.Size([2, 6, 32]), torch.Size([2, 8, 32]))

    Reference: Hinton et al. 2012, applied to whole vectors; latent dropout as in kklemon/FlashPerceiver.
    """

    def __init__(self, rate: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        checks.probability(rate=rate)
        self.rate, self.generator = rate, generator
        self._draws = RepeatableDraws()

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b kept d"]:
        """Return a random subset of the latents in training mode and all latents in evaluation mode."""
        if not self.training or not self.rate:
            return latents
        m, generator = latents.shape[1], self._draws.generator(self.generator)
        order = torch.empty(m, device=latents.device).normal_(generator=generator)
        kept = order.topk(max(1, checks.part_of(m, 1 - self.rate))).indices
        return latents[:, kept.sort().values]
