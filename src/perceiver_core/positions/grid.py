"""Coordinates of the points of a grid, and tables of position features over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode


@runtime_checkable
class Positions(Protocol):
    """Position features of the tokens of a grid, as tables that broadcast over it.

    Example:
        >>> from perceiver_core import positions
        >>> isinstance(positions.Fourier(num_axes=2, num_bands=4), positions.Positions)
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


def coordinates(size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Float[Tensor, " n"]:
    """Return the coordinates of `size` tokens along an axis, evenly spaced from -1 to 1, ends included.

    Example:
        >>> from perceiver_core.positions import coordinates
        >>> coordinates(5).tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    # Not linspace, which would make a dynamic size of torch.compile a constant.
    indices = torch.arange(size, device=device, dtype=dtype or torch.get_default_dtype())
    return indices.mul_(2).div_(max(size - 1, 1)).sub_(1)


def grid_points(grid: Sequence[int], like: Tensor) -> Float[Tensor, "*grid axes"]:
    """Return the coordinates of every point of a grid, the first axis first.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import grid_points
        >>> grid_points((2, 3), like=torch.zeros(()))[1].tolist()
        [[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = [coordinates(size, like.device, computing_dtype(like)) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


Features: TypeAlias = Callable[[Tensor, int], list[Tensor]]
"""Function `(x: *b, axis) -> [*b f, ...]` from coordinates along an axis to groups of features, whose widths are the
same for all axes."""


def separable_features(features: Features, points: Tensor) -> Float[Tensor, "*b p"]:
    """Return the features of points `*b axes`, ordered by group, then by axis."""
    axes = [features(x, axis) for axis, x in enumerate(points.unbind(-1))]
    return torch.cat([part for group in zip(*axes, strict=True) for part in group], dim=-1)


def separable_tables(features: Features, grid: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
    """Return one table `1 .. size .. 1 p` per axis, zero in the columns of other axes; their sum is the features."""
    tables = []
    num_axes, dtype = len(grid), computing_dtype(like)
    for axis, size in enumerate(grid):
        groups = features(coordinates(size, like.device, dtype), axis)
        others = num_axes - 1 - axis
        own = torch.cat([F.pad(g, (axis * g.shape[-1], others * g.shape[-1])) for g in groups], dim=-1)
        shape = [1] * num_axes
        shape[axis] = size
        tables.append(own.to(like.dtype).reshape(*shape, own.shape[-1]))
    return tuple(tables)


def small_tables(
    features: Features, settings: tuple[object, ...], grid: Sequence[int], like: Tensor
) -> tuple[Tensor, ...]:
    """Return `separable_tables`; those of small grids are cached, since they would dominate the time of a small model.

    The class and hyperparameters that determine the features are `settings`, a part of the cache's key.
    """
    plain = type(like) is Tensor and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
    if (
        not plain
        or sum(grid) > CACHED_ROWS
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (like.device.type == "cuda" and torch.cuda.is_current_stream_capturing())  # computed when it is replayed
    ):
        return separable_tables(features, grid, like)
    key = (settings, tuple(grid), like.dtype, like.device)
    cached = _cache.get(key, ())
    if cached and all(table._version == version and not table.requires_grad for table, version in cached):
        return tuple([table for table, _ in cached])
    with torch.inference_mode(False):  # a tensor created in inference mode could not be used outside it
        tables = separable_tables(features, grid, like)
    if sum(table.numel() for table in tables) <= CACHED_NUMBERS:
        if len(_cache) >= CACHED_GRIDS:
            _cache.clear()
        _cache[key] = tuple([(table, table._version) for table in tables])
    return tables


CACHED_GRIDS, CACHED_ROWS, CACHED_NUMBERS = 64, 512, 2**16  # at most 16 MB in float32
_cache: dict[tuple[object, ...], tuple[tuple[Tensor, int], ...]] = {}
"""Tables with their versions, by which edits in place are seen."""


def check_axes(grid: Sequence[int], num_axes: int) -> None:
    """Raise ValueError unless `grid` has `num_axes` axes, none empty."""
    if len(grid) != num_axes or any(size < 1 for size in grid):
        raise ValueError(f"grid must have {num_axes} axes of at least one token; got {tuple(grid)}")


def computing_dtype(like: Tensor) -> torch.dtype:
    """Return float32 or wider: high frequencies have no meaning in half precision."""
    return torch.promote_types(like.dtype, torch.float32)
