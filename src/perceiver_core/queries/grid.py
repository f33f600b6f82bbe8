"""Queries that are positions on a grid: an answer for each of its points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core.positions import Positions
from perceiver_core.positions.grid import check_axes, computing_dtype
from perceiver_core.queries.choose import check_indices, check_takes_points
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Grid(nn.Module):
    """The position features of every point of a grid, the last axis fastest. Those of chosen points alone are made.

    Args:
        grid: its size; None for the grid of the input. Places are those of the grid, whatever a mask hides, as those of
            `adapters.TokenEmbedding(positions_include_padding=True)` are.
        positions: position features over as many axes.
        endpoint: whether chosen points stand at -1 + 2 i / size along each axis, as those of the published multimodal
            model do, and not where they stand on the whole grid, -1 + 2 i / (size - 1). Needs positions that take
            points, such as `positions.Fourier`.

    Raises:
        TypeError: `endpoint` of positions that take no points.
        ValueError: a grid of other axes than the positions have.

    Example:
        >>> import torch
        >>> from perceiver_core import positions, queries
        >>> ask = queries.Grid((480, 640), positions.Fourier(num_axes=2, num_bands=16, max_resolution=(480, 640)))
        >>> ask(query_indices=torch.randint(480 * 640, (1000,))).shape
        torch.Size([1, 1000, 66])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2; table 8 (queries by task).
    """

    def __init__(self, grid: Sequence[int] | None, positions: Positions, *, endpoint: bool = False) -> None:
        super().__init__()
        if endpoint:
            check_takes_points(positions)
        if grid is not None:
            check_axes(grid, positions.num_axes)
        self.grid, self.positions, self.endpoint = None if grid is None else tuple(grid), positions, endpoint

    @property
    def dim(self) -> int:
        """The width of a query."""
        return self.positions.dim

    def grid_of(self, tokens: Tokens | None = None) -> tuple[int, ...] | None:
        """The grid that is asked on: its own, or that of the input."""
        return self.grid or (tuple(tokens.grid) if isinstance(tokens, Tokens) else None)

    def forward(
        self, tokens: Tokens | None = None, *, query_indices: Int[Tensor, "*b q"] | None = None
    ) -> Float[Tensor, "#b q e"]:
        """The features of all points, or of those `query_indices` indices into the flattened grid.

        Args:
            tokens: those of the input, for their grid, dtype and device.
            query_indices: which points; see `queries`.
        """
        grid = self.grid_of(tokens)
        if grid is None:
            raise ValueError("tokens must be Tokens, whose grid is asked for; or build OnGrid with a grid of its own")
        like = (
            tokens.content if isinstance(tokens, Tokens) else torch.empty(0, device=None if query_indices is None else query_indices.device)
        )
        if query_indices is not None and self.endpoint:
            return self._without_endpoint(query_indices, grid, like)
        tables = self.positions.tables(grid, like)
        if query_indices is None:
            features = sum(tables[1:], tables[0]).expand(*grid, -1).flatten(0, -2)
            return features[None]
        check_indices(query_indices, torch.Size(grid).numel())
        places = _unraveled(query_indices, grid)
        picked = [_at(table, places) for table in tables]
        features = sum(picked[1:], picked[0])
        return features[None] if query_indices.ndim == 1 else features

    def _without_endpoint(self, at: Tensor, grid: Sequence[int], like: Tensor) -> Tensor:
        check_indices(at, torch.Size(grid).numel())
        places = [
            2 * place.to(computing_dtype(like)) / size - 1
            for place, size in zip(_unraveled(at, grid), grid, strict=True)
        ]
        features: Tensor = self.positions(torch.stack(places, dim=-1)).to(like.dtype)  # type: ignore[operator]
        return features[None] if at.ndim == 1 else features


def _at(table: Tensor, places: list[Tensor]) -> Tensor:
    """The entries of a table that broadcasts over the grid."""
    return table[tuple([place * (size > 1) for place, size in zip(places, table.shape, strict=False)])]


def _unraveled(at: Tensor, grid: Sequence[int]) -> list[Tensor]:
    """The place along each axis."""
    places = []
    for size in reversed(grid):
        places.append(at % size)
        at = at // size
    return places[::-1]
