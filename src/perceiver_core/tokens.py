"""Tokens: output of an adapter and input of a read.

Position features are stored separately from the content, as a few small tables that broadcast over the grid and add up
to the features of every token: a 224 x 224 image has two tables of 224 rows, not 50,176 feature vectors per sample.
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

    The position features of a token are the *sum* of its entries in `position_tables`, each of which broadcasts over
    the grid. Tables of separable features (Fourier, one per axis) fill disjoint columns, so their sum is the
    concatenation of the paper; a learned array is one table over the whole grid. Materialized, a token is the vector
    `[content, positions]`.

    Args:
        content: Content features, `b *grid c`.
        position_tables: Tables `*g p`, where every axis of `g` is that of the grid or 1; all of the same width `p`.
        mask: Valid tokens, `b *grid`, True = attend. The values of masked tokens have no effect, NaN included.
        modalities: Tokens of each modality by name, on their own grid, or None for an absent modality, where these
            tokens join several modalities; see `adapters.Multimodal`. Reads do not use it.

    Raises:
        TypeError: Content that is not floating point, a mask that is not boolean.
        ValueError: An empty grid, tables that do not broadcast over it, a mask of another shape.

    Example:
        >>> rows, columns = torch.randn(5, 1, 6), torch.randn(1, 7, 6)
        >>> tokens = pc.Tokens(torch.randn(2, 5, 7, 3), position_tables=(rows, columns))
        >>> tokens.grid, tokens.dim, tokens.materialize().shape
        ((5, 7), 9, torch.Size([2, 35, 9]))
    """

    content: Float[Tensor, "b *grid c"]
    position_tables: tuple[Float[Tensor, "... p"], ...] = ()
    mask: Bool[Tensor, " b *grid"] | None = None
    modalities: Mapping[str, Tokens | None] | None = None

    def __post_init__(self) -> None:
        content = self.content
        if not isinstance(content, Tensor) or not content.is_floating_point():
            checks.is_floating("content", content)
        if content.ndim < 3:
            raise ValueError(f"content must have at least 3 axes (b *grid c); got shape {tuple(content.shape)}")
        if 0 in content.shape:
            checks.not_empty("content", content)
        if self.position_tables:
            self._check_tables()
        if self.mask is not None:
            checks.is_mask("mask", self.mask, content.shape[:-1])

    def _check_tables(self) -> None:
        grid = self.content.shape[1:-1]
        width = self.position_tables[0].shape[-1]
        for table in self.position_tables:
            *sizes, own_width = table.shape
            if (
                len(sizes) != len(grid)
                or own_width != width
                or any(size not in (1, full) for size, full in zip(sizes, grid, strict=True))
            ):
                raise ValueError(
                    f"each table must broadcast over the grid {tuple(grid)} and have one width; "
                    f"got shapes {[tuple(t.shape) for t in self.position_tables]}"
                )

    @property
    def grid(self) -> tuple[int, ...]:
        """Size of each grid axis."""
        return tuple(self.content.shape[1:-1])

    @property
    def num_tokens(self) -> int:
        """Number of tokens per sample."""
        return prod(self.content.shape[1:-1])

    @property
    def dim(self) -> int:
        """Width of a token: content and positions."""
        return self.content.shape[-1] + (self.position_tables[0].shape[-1] if self.position_tables else 0)

    def positions(self) -> Float[Tensor, "*grid p"] | None:
        """Return the position features of every token, or None without position tables."""
        if not self.position_tables:
            return None
        total = sum(self.position_tables[1:], start=self.position_tables[0])
        return total.expand(*self.content.shape[1:-1], total.shape[-1])

    def flat_mask(self) -> Bool[Tensor, "b n"] | None:
        """Return the mask with the grid flattened."""
        return None if self.mask is None else self.mask.flatten(1)

    def materialize(self) -> Float[Tensor, "b n dim"]:
        """Return all tokens written out, with the content of masked tokens set to zero."""
        content = self.content
        if self.mask is not None:
            content = content.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        positions = self.positions()
        if positions is not None:
            shared = positions.to(content).expand(content.shape[0], *positions.shape)
            content = torch.cat([content, shared], dim=-1)
        return content.flatten(1, -2)
