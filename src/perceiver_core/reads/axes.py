"""Merging of grid axes that share a position table, such as one learned table over height and width."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core.argument_errors import explained
from perceiver_core.tokens import Tokens


@explained
def merged_axes(tokens: Tokens) -> tuple[int, ...]:
    """Return the grid size after merging axes that share a position table.

    Consecutive axes are merged if one table varies along all of them, such as a learned table over height and width.

    Example:
        >>> from perceiver_core.reads.axes import merged_axes
        >>> frames, learned = torch.randn(5, 1, 1, 6), torch.randn(1, 7, 3, 6)
        >>> merged_axes(pc.Tokens(torch.randn(2, 5, 7, 3, 4), (frames, learned)))
        (5, 21)
    """
    grid = tokens.content.shape[1:-1]
    return tuple([prod(grid[start:end]) for start, end in _groups(_spans(tokens), len(grid))])


def axis_tables(tokens: Tokens, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[Float[Tensor, "size p"], ...]]:
    """Return the grid size after merging axes (see `merged_axes`), and one position table `size p` per merged axis.

    If several position tables vary along a merged axis, they are added. Tables that are constant over the grid are
    added to the first axis. The tuple of tables is empty if the tokens have no position tables.
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
        # A single table per axis is not copied. On a one-dimensional grid, it can be as large as a sample.
        own = [table.to(dtype).expand(*shape, width).reshape(-1, width) for table in tables]
        sums.append(sum(own[1:], own[0]) if own else zeros.expand(size, width))
    return axes, tuple(sums)


def _spans(tokens: Tokens) -> list[tuple[int, int]]:
    """Return a pair per position table: the first and last grid axis along which it varies, or (0, 0) if constant."""
    spans = []
    for table in tokens.position_tables:
        varying = [axis for axis, size in enumerate(table.shape[:-1]) if size != 1]
        spans.append((varying[0], varying[-1]) if varying else (0, 0))
    return spans


def _groups(spans: list[tuple[int, int]], num_axes: int) -> list[tuple[int, int]]:
    """Return (start, exclusive end) of each group of axes that share a table. `spans` is the result of `_spans`."""
    starts = [axis for axis in range(num_axes) if all(not first < axis <= last for first, last in spans)]
    return list(zip(starts, [*starts[1:], num_axes], strict=True))
