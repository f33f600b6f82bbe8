"""Merging of grid axes that share a position table. After merging, there is one position table per axis."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core.tokens import Tokens


def merged_axes(tokens: Tokens) -> tuple[int, ...]:
    """Return the grid size after merging consecutive axes along which the same position table varies.

    Example:
        >>> from perceiver_core.reads.axes import merged_axes
        >>> frames, learned = torch.randn(5, 1, 1, 6), torch.randn(1, 7, 3, 6)
        >>> merged_axes(pc.Tokens(torch.randn(2, 5, 7, 3, 4), (frames, learned)))
        (5, 21)
    """
    grid = tokens.content.shape[1:-1]
    return tuple([prod(grid[start:end]) for start, end in _groups(_spans(tokens), len(grid))])


def axis_tables(tokens: Tokens, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[Float[Tensor, "size p"], ...]]:
    """Return the grid size after merging axes, and a tuple of one position table `size p` per merged axis.

    The table of an axis is the sum of all position tables that vary along it. If the tokens have no position tables,
    the tuple is empty.
    """
    grid, spans = tokens.content.shape[1:-1], _spans(tokens)
    groups = _groups(spans, len(grid))
    axes = tuple([prod(grid[start:end]) for start, end in groups])
    if not spans:
        return axes, ()
    width = tokens.position_tables[0].shape[-1]
    zeros = tokens.content.new_zeros(1, width, dtype=dtype)
    sums = []
    for (start, end), size in zip(groups, axes, strict=True):
        shape = [length if start <= axis < end else 1 for axis, length in enumerate(grid)]
        tables = [
            table for table, (first, _) in zip(tokens.position_tables, spans, strict=True) if start <= first < end
        ]
        # The only table of an axis is not copied. On a one-dimensional grid, it can be as large as a sample.
        own = [table.to(dtype).expand(*shape, width).reshape(-1, width) for table in tables]
        sums.append(sum(own[1:], own[0]) if own else zeros.expand(size, width))
    return axes, tuple(sums)


def _spans(tokens: Tokens) -> list[tuple[int, int]]:
    """Return the first and last axis along which each position table varies, or (0, 0) for a constant table."""
    spans = []
    for table in tokens.position_tables:
        varying = [axis for axis, size in enumerate(table.shape[:-1]) if size != 1]
        spans.append((varying[0], varying[-1]) if varying else (0, 0))
    return spans


def _groups(spans: list[tuple[int, int]], num_axes: int) -> list[tuple[int, int]]:
    """Return the start and (exclusive) end of each group of consecutive axes that share a position table."""
    starts = [axis for axis in range(num_axes) if all(not first < axis <= last for first, last in spans)]
    return list(zip(starts, [*starts[1:], num_axes], strict=True))
