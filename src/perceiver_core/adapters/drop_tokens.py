"""Dropout of whole tokens, which saves the time of reading them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers.random_draws import RepeatableDraws
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class DropTokens(nn.Module):
    """Adapter that drops tokens of another adapter in training, drawn for each sample.

    Of n tokens, (1 - rate) n are kept, rounded down, at least one, in their order; of the valid tokens of a sample the
    same share, rounded up. `Rotary`, causal masks and `queries.Grid(None, ...)` go by a token's index, so they would
    see the kept tokens as neighbors: drop only tokens that carry their positions, or need none.

    Args:
        adapter: Adapter that makes the tokens.
        rate: Share of the tokens that is dropped.
        generator: Generator of the random draws; PyTorch's default generator by default. It is not saved.

    Example:
        >>> adapter = pc.adapters.DropTokens(pc.adapters.Grid(num_channels=10, positions=None), rate=0.25)
        >>> x = torch.randn(2, 48, 10)
        >>> adapter.train()(x).num_tokens, adapter.eval()(x).num_tokens
        (36, 48)

    Reference: Hawthorne et al. 2022 (Perceiver AR), section 3.3 (cross-attend dropout); lucidrains/perceiver-pytorch,
    `dropout_seq`.
    """

    def __init__(self, adapter: nn.Module, *, rate: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        checks.probability(rate=rate)
        self.adapter, self.rate, self.generator = adapter, rate, generator
        self.dim: int = cast(Any, adapter).dim
        self._draws = RepeatableDraws()

    def forward(self, x: object, *, mask: Tensor | None = None) -> Tokens:
        """Return the tokens of the adapter; in training the kept ones, without a grid."""
        tokens: Tokens = self.adapter(x) if mask is None else self.adapter(x, mask=mask)
        if not self.training or not self.rate:
            return tokens
        content, valid = tokens.materialize(), tokens.flat_mask()
        generator = self._draws.generator(self.generator)
        # Not torch.randn, which with a generator takes no dynamic sizes of torch.compile.
        order = torch.empty(content.shape[:2], device=content.device).normal_(generator=generator)
        if valid is not None:
            order = order.masked_fill(~valid, -torch.inf)  # valid tokens are kept first
        num_kept = max(1, checks.part_of(tokens.num_tokens, 1 - self.rate))
        kept, rank = order.topk(num_kept, dim=1).indices.sort(1)
        content = content.gather(1, kept[..., None].expand(-1, -1, content.shape[-1]))
        if valid is None:
            return Tokens(content)
        num_valid = ((1 - self.rate) * valid.sum(1, keepdim=True).double() - 1e-9).ceil()
        return Tokens(content, mask=valid.gather(1, kept) & (rank < num_valid))
