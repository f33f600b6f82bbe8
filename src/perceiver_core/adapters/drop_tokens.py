"""Adapter that drops random tokens in training, to reduce the cost of cross-attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.lengths import Lengths, options
from perceiver_core.layers.random_draws import RepeatableDraws
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class DropTokens(nn.Module):
    """Adapter that wraps another adapter and drops random tokens of each sample in training.

    It keeps max(1, floor((1 - rate) n)) of n tokens, in their original order. If a sample has only v valid tokens, at
    most ceil((1 - rate) v) of the kept tokens are valid, and the others are masked.

    Do not use this adapter with `Rotary`, causal masks or `queries.Grid(None, ...)`. These use token indices, so they
    would treat the kept tokens as adjacent. Position encodings of the wrapped adapter are not affected.

    Args:
        adapter: Adapter to wrap.
        rate: Fraction of tokens to drop, in [0, 1).
        generator: Random generator; None for PyTorch's default generator. It is not saved with the model.

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

    def forward(self, x: object, *, mask: Tensor | None = None, lengths: Lengths | None = None) -> Tokens:
        """Return the tokens of the wrapped adapter. In training, return only the kept tokens, as a flat sequence."""
        tokens: Tokens = self.adapter(x, **options(mask=mask, lengths=lengths))
        if not self.training or not self.rate:
            return tokens
        content, valid = tokens.materialize(), tokens.flat_mask()
        generator = self._draws.generator(self.generator)
        # torch.randn with a generator does not support the dynamic shapes of torch.compile.
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
