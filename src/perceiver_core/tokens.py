"""Tokens: what an adapter hands to a reader.

Unusual here: positions are not concatenated to the content. They stay a few small tables, whose sum over
the grid is the position of every token, so a 224 x 224 picture carries two tables of 224 rows instead of
50,176 feature vectors for each sample of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import checks


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of tokens on a grid: content, position tables, mask.

    The position features of a token are the *sum* of its entries in `position_tables`, each of which broadcasts
    over the grid. Tables of separable features (Fourier, one axis each) fill disjoint columns, so their
    sum is the concatenation of the paper; a learned array is one table over the whole grid. The vector
    that a token is read as is `[content, positions]`.

    Args:
        content: `b *grid c`.
        position_tables: each `*g p` where every axis of `g` is that of the grid or 1; all of one width `p`.
        mask: `b *grid`, True = attend. What masked tokens hold has no effect, NaN included.
        modalities: of tokens that were put together from several kinds, those of each kind by its name, on their own
            grid, and None for a kind that is not there; see `adapters.Multimodal`. A reader does not look at them.

    Raises:
        TypeError: content that is not floating point, a mask that is not boolean.
        ValueError: an empty grid, tables that do not broadcast over it, a mask of another shape.

    Example:
        >>> import torch
        >>> from perceiver_core import Tokens
        >>> rows, columns = torch.randn(5, 1, 6), torch.randn(1, 7, 6)
        >>> tokens = Tokens(torch.randn(2, 5, 7, 3), position_tables=(rows, columns))
        >>> tokens.grid, tokens.dim, tokens.materialize().shape
        ((5, 7), 9, torch.Size([2, 35, 9]))
    """

    content: Float[Tensor, "b *grid c"]
    position_tables: tuple[Float[Tensor, "... p"], ...] = ()
    mask: Bool[Tensor, " b *grid"] | None = None
    modalities: Mapping[str, Tokens | None] | None = None

    def __post_init__(self) -> None:
        checks.is_floating("content", self.content)
        if self.content.ndim < 3:
            raise ValueError(f"content must have at least 3 axes (b *grid c); got shape {tuple(self.content.shape)}")
        checks.not_empty("content", self.content)
        for table in self.position_tables:
            self._check_table(table)
        if self.mask is not None:
            checks.is_mask("mask", self.mask, self.content.shape[:-1])

    def _check_table(self, table: Tensor) -> None:
        fits = table.ndim == len(self.grid) + 1 and all(
            size in (1, full) for size, full in zip(table.shape[:-1], self.grid, strict=True)
        )
        if not fits or table.shape[-1] != self.position_tables[0].shape[-1]:
            raise ValueError(
                f"each table must broadcast over the grid {self.grid} and have one width; "
                f"got shapes {[tuple(t.shape) for t in self.position_tables]}"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """The size of each grid axis."""
        return tuple(self.content.shape[1:-1])

    @property
    def num_tokens(self) -> int:
        """How many tokens a sample has."""
        return prod(self.grid)

    @property
    def dim(self) -> int:
        """The width of a token: content and positions."""
        return self.content.shape[-1] + (self.position_tables[0].shape[-1] if self.position_tables else 0)

    def positions(self) -> Float[Tensor, "*grid p"] | None:
        """The position features of every token, or None where there are no tables."""
        if not self.position_tables:
            return None
        total = sum(self.position_tables[1:], start=self.position_tables[0])
        return total.expand(*self.grid, total.shape[-1])

    def flat_mask(self) -> Bool[Tensor, "b n"] | None:
        """The mask with the grid flattened."""
        return None if self.mask is None else self.mask.flatten(1)

    def materialize(self) -> Float[Tensor, "b n dim"]:
        """All tokens written out, masked ones as zeros in their content."""
        content = self.content
        if self.mask is not None:
            content = content.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        positions = self.positions()
        if positions is not None:
            shared = positions.to(content).expand(content.shape[0], *positions.shape)
            content = torch.cat([content, shared], dim=-1)
        return content.flatten(1, -2)
