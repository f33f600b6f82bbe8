"""Protocols for position features, and functions that compute grid coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class Positions(Protocol):
    """Protocol for position features of tokens on a grid.

    The features are stored as position tables that broadcast over the grid. For a 5 x 7 grid, these may be two arrays
    of shape `5 1 p` and `1 7 p`. Their broadcast sum, of shape `5 7 p`, contains the features of every token.

    Example:
        >>> isinstance(pc.positions.Fourier(num_axes=2, num_bands=4), pc.positions.Positions)
        True
    """

    @property
    def dim(self) -> int:
        """Feature dimension p, the size of the last axis of the tables."""

    @property
    def num_axes(self) -> int:
        """Number of grid axes."""

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
        """Return the position tables for a grid of size `grid`, with the dtype and device of `like`."""


@runtime_checkable
class PointFeatures(Protocol):
    """Protocol for callables that map points `*b axes` to position features `*b dim`, such as `Fourier`."""

    dim: int
    num_axes: int

    def __call__(self, points: Tensor, /) -> Tensor:
        """Return the features of the points."""


def coordinates(size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, " n"]:
    """Return the coordinates of `size` tokens along an axis, evenly spaced from -1 to 1, endpoints included.

    Example:
        >>> pc.positions.coordinates(5).tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    # Not linspace: under torch.compile, it would specialize the graph to one size. Not max(size - 1, 1): a program
    # exported by PyTorch 2.6 would divide by zero for one token.
    indices = torch.arange(size, device=device, dtype=dtype or torch.get_default_dtype())
    return 2 * indices / indices[-1:].clamp(min=1) - 1


def grid_points(grid: Sequence[int], like: Tensor) -> Float[Tensor, "*grid axes"]:
    """Return the coordinates of all grid points, from -1 to 1. The last axis holds one coordinate per grid axis.

    Example:
        >>> pc.positions.grid_points((2, 3), like=torch.zeros(()))[1].tolist()
        [[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = [coordinates(size, like.device, computing_dtype(like)) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def check_axes(grid: Sequence[int], num_axes: int) -> None:
    """Check that `grid` has `num_axes` axes, each of size 1 or more."""
    if len(grid) != num_axes or any(size < 1 for size in grid):
        raise ValueError(f"grid must have {num_axes} axes of at least one token; got {tuple(grid)}")


def computing_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype for computing features: float32 or wider, because high frequencies need more than 16 bits."""
    return torch.promote_types(like.dtype, torch.float32)


def is_called_with(argument: str, positions: object) -> bool:
    """Return whether `positions` can be called with this kind of argument: "points", "indices" or "grid".

    User-defined callables have no attribute `_called_with`. They are assumed to accept any argument.
    """
    if not callable(positions) or getattr(type(positions), "forward", None) is nn.Module.forward:
        return False
    return getattr(positions, "_called_with", argument) == argument


def check_takes_points(positions: object) -> None:
    """Check that `positions` has the attributes `dim` and `num_axes` and can be called with points."""
    has_sizes = hasattr(positions, "dim") and hasattr(positions, "num_axes")
    if not has_sizes or not is_called_with("points", positions):
        raise TypeError(
            f"positions must have dim and num_axes and take points, as positions.Fourier; got {positions!r}"
        )
