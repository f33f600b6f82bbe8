"""Protocols of position features, coordinates of the points of a grid, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Positions(Protocol):
    """Position features of the tokens of a grid, as tables that broadcast over it.

    Example:
        >>> isinstance(pc.positions.Fourier(num_axes=2, num_bands=4), pc.positions.Positions)
        True
    """

    @property
    def dim(self) -> int:
        """Width of the features."""

    @property
    def num_axes(self) -> int:
        """Number of grid axes."""

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
        """Return tables whose sum is the features of every token of `grid`, in the dtype and device of `like`."""


@runtime_checkable
class PointFeatures(Protocol):
    """Position features that are called with points `*b axes` and return features `*b dim`, such as `Fourier`."""

    dim: int
    num_axes: int

    def __call__(self, points: Tensor, /) -> Tensor:
        """Return the features."""


def coordinates(size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, " n"]:
    """Return the coordinates of `size` tokens along an axis, evenly spaced from -1 to 1, ends included.

    Example:
        >>> pc.positions.coordinates(5).tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    # Not linspace, which would make a dynamic size of torch.compile a constant.
    indices = torch.arange(size, device=device, dtype=dtype or torch.get_default_dtype())
    return indices.mul_(2).div_(max(size - 1, 1)).sub_(1)


def grid_points(grid: Sequence[int], like: Tensor) -> Float[Tensor, "*grid axes"]:
    """Return the coordinates of every point of a grid, the first axis first.

    Example:
        >>> pc.positions.grid_points((2, 3), like=torch.zeros(()))[1].tolist()
        [[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = [coordinates(size, like.device, computing_dtype(like)) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def check_axes(grid: Sequence[int], num_axes: int) -> None:
    """Raise ValueError unless `grid` has `num_axes` axes, none empty."""
    if len(grid) != num_axes or any(size < 1 for size in grid):
        raise ValueError(f"grid must have {num_axes} axes of at least one token; got {tuple(grid)}")


def computing_dtype(like: Tensor) -> torch.dtype:
    """Return float32 or wider: high frequencies have no meaning in half precision."""
    return torch.promote_types(like.dtype, torch.float32)


def is_called_with(argument: str, positions: object) -> bool:
    """Return whether positions are called with "points", "indices" or a "grid"; those of users may be with any."""
    if not callable(positions) or getattr(type(positions), "forward", None) is nn.Module.forward:
        return False
    return getattr(positions, "_called_with", argument) == argument


def check_takes_points(positions: object) -> None:
    """Raise TypeError unless positions are `PointFeatures`."""
    has_sizes = hasattr(positions, "dim") and hasattr(positions, "num_axes")
    if not has_sizes or not is_called_with("points", positions):
        raise TypeError(
            f"positions must have dim and num_axes and take points, as positions.Fourier; got {positions!r}"
        )
