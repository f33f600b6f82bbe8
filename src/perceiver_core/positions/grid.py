"""Where the tokens of a grid are, and position features of one axis laid into the columns of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@runtime_checkable
class Positions(Protocol):
    """Anything that gives the tokens of a grid their position features, as tables that broadcast over it.

    Example:
        >>> from perceiver_core import positions
        >>> isinstance(positions.Fourier(num_axes=2, num_bands=4), positions.Positions)
        True
    """

    @property
    def dim(self) -> int:
        """The width of the features."""
        ...

    @property
    def num_axes(self) -> int:
        """How many axes the grid has."""
        ...

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
        """Tables whose sum is the features of every token of `grid`, in the dtype and on the device of `like`."""
        ...


def coordinates(size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, " n"]:
    """The positions along an axis of `size` tokens: evenly spaced from -1 to 1, ends included.

    Example:
        >>> from perceiver_core.positions import coordinates
        >>> coordinates(5).tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    # Not linspace: of a size that torch.compile leaves open it would make a constant.
    return 2 * torch.arange(size, device=device, dtype=dtype or torch.get_default_dtype()) / max(size - 1, 1) - 1


def grid_points(grid: Sequence[int], like: Tensor) -> Float[Tensor, "*grid axes"]:
    """The coordinates of every point of a grid, the first axis first.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import grid_points
        >>> grid_points((2, 3), like=torch.zeros(()))[1].tolist()
        [[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = [coordinates(size, like.device, computing_dtype(like)) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


Features: TypeAlias = Callable[[Tensor, int], list[Tensor]]
"""Groups of features of coordinates along one axis: `(x: *b, axis) -> [*b f, ...]`, each as wide for every axis."""


def separable_features(features: Features, points: Tensor) -> Float[Tensor, "*b p"]:
    """The features of points `*b axes`, group by group and in a group axis by axis."""
    axes = [features(x, axis) for axis, x in enumerate(points.unbind(-1))]
    return torch.cat([part for group in zip(*axes, strict=True) for part in group], dim=-1)


def separable_tables(features: Features, grid: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
    """One table an axis, `1 .. size .. 1 p`, zero in the columns of the other axes: their sum is the features."""
    tables = []
    for axis, size in enumerate(grid):
        groups = features(coordinates(size, like.device, computing_dtype(like)), axis)
        others = len(grid) - 1 - axis
        own = torch.cat([F.pad(g, (axis * g.shape[-1], others * g.shape[-1])) for g in groups], dim=-1)
        tables.append(own.to(like.dtype).reshape(*(size if a == axis else 1 for a in range(len(grid))), own.shape[-1]))
    return tuple(tables)


def check_axes(grid: Sequence[int], axes: int) -> None:
    """Raises ValueError unless `grid` has `axes` axes, none empty."""
    if len(grid) != axes or any(size < 1 for size in grid):
        raise ValueError(f"grid must have {axes} axes of at least one token; got {tuple(grid)}")


def computing_dtype(like: Tensor) -> torch.dtype:
    """Positions are computed in float32 at least: high bands have no meaning in half precision."""
    return torch.promote_types(like.dtype, torch.float32)
