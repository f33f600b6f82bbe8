"""Query module for the points of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core.positions import Positions
from perceiver_core.positions.grid import (
    PointFeatures,
    check_axes,
    check_takes_points,
    computing_dtype,
    warn_if_padded,
)
from perceiver_core.queries.selection import check_indices
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@partial(register, name="queries.Grid")
class Grid(nn.Module):
    """Query module that returns the position encoding of grid points, in row-major order.

    If `query_indices` selects grid points, only their position encodings are computed.

    Args:
        grid: Grid size; None to use the grid size of the input tokens. Masked tokens are also grid points, so use
            `adapters.TokenEmbedding(positions_include_padding=True)` for the same positions in the adapter.
        positions: Position encoding with the same number of axes as the grid.
        endpoint: Whether the last point along each axis has coordinate 1, as in `numpy.linspace`. If True, point i has
            coordinate -1 + 2 i / (size - 1). If False, selected points have coordinates -1 + 2 i / size, as in the
            published multimodal model. False requires a position encoding that accepts any coordinates, such as
            `positions.Fourier`. Without `query_indices`, this argument has no effect.

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
        """Return the grid size: `grid` if it is set, otherwise the grid size of `tokens`, or None if there is none."""
        return self.grid or (tokens.grid if isinstance(tokens, Tokens) else None)

    def forward(
        self,
        tokens: Tokens | Tensor | Sequence[Tokens | Tensor] | None = None,
        query_indices: Int[Tensor, "*b q"] | None = None,
    ) -> Float[Tensor, "#b q e"]:
        """Return the position encoding of all grid points, or only of selected points.

        Args:
            tokens: Input tokens. They determine the dtype and device of the queries and, if the argument `grid` of the
                class is None, the grid size. May be None if `grid` is set.
            query_indices: Indices of the selected points in the flattened grid, `q` or `b q`; all points by default.

        Raises:
            TypeError: If `query_indices` is not an integer tensor.
            ValueError: If there is no grid size, or `query_indices` has the wrong shape.
            ValueError: If an index is out of range (checked on the CPU in eager mode only).
        """
        grid = self.grid_of(tokens)
        if grid is None:
            raise ValueError("tokens must be Tokens, whose grid is used; or build Grid with a grid of its own")
        device = None if query_indices is None else query_indices.device
        like = _content(tokens)
        like = torch.empty(0, device=device) if like is None else like
        if self.grid is None and isinstance(tokens, Tokens):
            warn_if_padded(self.positions, tokens.mask)
        if query_indices is None:
            tables = self.positions.tables(grid, like)
            return sum(tables[1:], tables[0]).expand(*grid, -1).flatten(0, -2)[None]
        check_indices(query_indices, prod(grid))
        indices = _unravel(query_indices, grid)
        if self.endpoint:
            rows = [_rows(table, indices) for table in self.positions.tables(grid, like)]
            features = sum(rows[1:], rows[0])
        else:
            dtype = computing_dtype(like)
            points = [2 * index.to(dtype) / size - 1 for index, size in zip(indices, grid, strict=True)]
            features = cast(PointFeatures, self.positions)(torch.stack(points, dim=-1)).to(like.dtype)
        return features[None] if query_indices.ndim == 1 else features


def _content(tokens: object) -> Tensor | None:
    """Return the content of the input tokens (of the first input if there are several), or None without inputs."""
    if isinstance(tokens, Tokens):
        return tokens.content
    if isinstance(tokens, (list, tuple)) and tokens:
        return _content(tokens[0])
    return tokens if isinstance(tokens, Tensor) and tokens.is_floating_point() else None


def _rows(table: Tensor, indices: list[Tensor]) -> Tensor:
    """Index a position table with one index tensor per grid axis. Along axes of size 1, use index 0."""
    return table[tuple([index * (size > 1) for index, size in zip(indices, table.shape[:-1], strict=True)])]


def _unravel(flat: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """Convert indices into the flattened grid to one index tensor per axis, as `torch.unravel_index` does."""
    indices = []
    for size in reversed(grid):
        quotient = flat // size
        indices.append(flat - quotient * size)  # not flat % size, which ONNX export cannot convert for dynamic sizes
        flat = quotient
    return indices[::-1]
