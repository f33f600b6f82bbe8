"""Dropout of whole tokens: what is dropped is not read, which saves its time too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.random_draws import RepeatableDraws
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class DropTokens(nn.Module):
    """An adapter whose tokens are in training a part of them only, drawn anew for each sample.

    Of n tokens, (1 - rate) n are left, rounded down, one at least, in their order; of those that a mask leaves, the
    same share, rounded up. Whatever goes by a token's number, `Rotary`, a causal mask or `queries.Grid(None, ...)`,
    sees those that are left as neighbors: for tokens that carry their positions, or need none.

    Args:
        adapter: makes the tokens.
        rate: the share of tokens that is dropped.
        generator: draws which; PyTorch's own unless given. It is not saved.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
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
        self._draws = RepeatableDraws()

    @property
    def dim(self) -> int:
        """The width of a token."""
        return int(self.adapter.dim)  # type: ignore[arg-type]

    def forward(self, x: Any, *, mask: Tensor | None = None) -> Tokens:
        """The tokens of the adapter; in training some of them, as a list without a grid."""
        tokens: Tokens = self.adapter(x) if mask is None else self.adapter(x, mask=mask)
        if not self.training or not self.rate:
            return tokens
        content = tokens.materialize()
        # Not torch.randn: with a generator it takes no sizes that torch.compile leaves open.
        order = torch.empty(content.shape[:2], device=content.device).normal_(
            generator=self._draws.generator(self.generator)
        )
        present = None if tokens.mask is None else tokens.mask.flatten(1)
        if present is not None:
            order = order.masked_fill(~present, -torch.inf)
        best = order.topk(
            max(1, checks.part_of(tokens.num_tokens, 1 - self.rate)), dim=1
        ).indices  # those that are there come first
        kept, place = best.sort(1)
        content = content.gather(1, kept[..., None].expand(-1, -1, content.shape[-1]))
        if present is None:
            return Tokens(content)
        share = ((1 - self.rate) * present.sum(1, keepdim=True).double() - 1e-9).ceil()
        counted = place < share
        return Tokens(content, mask=present.gather(1, kept) & counted)
