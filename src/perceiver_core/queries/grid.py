"""Queries that are positions on a grid: one output per grid point."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core.positions import Positions
from perceiver_core.positions.grid import PointFeatures, check_axes, check_takes_points, computing_dtype
from perceiver_core.queries.selection import check_indices
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@partial(register, name="queries.Grid")
class Grid(nn.Module):
    """Queries that are the position features of grid points, the last axis fastest; only selected ones are computed.

    Args:
        grid: Size of the grid; None for that of the input. Masks do not shift positions on the grid, as with
            `adapters.TokenEmbedding(positions_include_padding=True)`.
        positions: Position features over the same number of axes.
        endpoint: Whether selected points have their coordinates on the whole grid, -1 + 2 i / (size - 1) along each
            axis, so that the last one is at 1 (as in `numpy.linspace`). If False they are at -1 + 2 i / size, as in
            the published multimodal model; this requires positions that take points, such as `positions.Fourier`.

    Example:
        >>> source = pc.queries.Grid((480, 640), pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=480))
        >>> source(query_indices=torch.randint(480 * 640, (1000,))).shape
        torch.Size([1, 1000, 66])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2; table 8 (queries by task).
    """

    def __init__(self, grid: Sequence[int] | None, positions: Positions, *, endpoint: bool = True) -> None:
        super().__init__()
        if not endpoint:
            check_takes_points(positions)
        if grid is not None:
            check_axes(grid, positions.num_axes)
        self.grid, self.positions, self.endpoint = None if grid is None else tuple(grid), positions, endpoint
        self.dim = positions.dim

    def grid_of(self, tokens: object = None) -> tuple[int, ...] | None:
        """Return the grid of the queries: its own, or that of the input."""
        return self.grid or (tokens.grid if isinstance(tokens, Tokens) else None)

    def forward(
        self, tokens: Tokens | None = None, query_indices: Int[Tensor, "*b q"] | None = None
    ) -> Float[Tensor, "#b q e"]:
        """Return the features of all grid points, or of those at `query_indices` into the flattened grid.

        Dtype and device are those of `tokens`, and so is the grid, if the queries have none of their own.
        """
        grid = self.grid_of(tokens)
        if grid is None:
            raise ValueError("tokens must be Tokens, whose grid is used; or build Grid with a grid of its own")
        device = None if query_indices is None else query_indices.device
        like = tokens.content if isinstance(tokens, Tokens) else torch.empty(0, device=device)
        if query_indices is None:
            tables = self.positions.tables(grid, like)
            return sum(tables[1:], tables[0]).expand(*grid, -1).flatten(0, -2)[None]
        check_indices(query_indices, torch.Size(grid).numel())
        indices = _unravel(query_indices, grid)
        if self.endpoint:
            rows = [_rows(table, indices) for table in self.positions.tables(grid, like)]
            features = sum(rows[1:], rows[0])
        else:
            dtype = computing_dtype(like)
            points = [2 * index.to(dtype) / size - 1 for index, size in zip(indices, grid, strict=True)]
            features = cast(PointFeatures, self.positions)(torch.stack(points, dim=-1)).to(like.dtype)
        return features[None] if query_indices.ndim == 1 else features


def _rows(table: Tensor, indices: list[Tensor]) -> Tensor:
    """Return the rows of a table that broadcasts over the grid, at an index along each axis."""
    return table[tuple([index * (size > 1) for index, size in zip(indices, table.shape[:-1], strict=True)])]


def _unravel(flat: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Return the index along each axis."""
    indices = []
    for size in reversed(grid):
        indices.append(flat % size)
        flat = flat // size
    return indices[::-1]
