"""Protocols for position features, grid coordinates, and a warning about positions that depend on padding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import argument_types, checks
from perceiver_core.argument_errors import explained


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


argument_types.describe(Positions, "an object with dim, num_axes and tables, such as positions.Fourier(num_axes=2)")
argument_types.describe(PointFeatures, "positions with dim and num_axes that take points, such as positions.Fourier(3)")


@explained
def coordinates(
    size: int, device: torch.device | None = None, dtype: torch.dtype | None = None, *, reference: int | None = None
) -> Float[Tensor, " n"]:
    """Return the coordinates of `size` tokens along an axis, evenly spaced from -1 to 1, endpoints included.

    `reference` is the number of tokens that span [-1, 1], by default `size`. With more tokens than that, coordinates
    exceed 1.

    Example:
        >>> pc.positions.coordinates(5).tolist(), pc.positions.coordinates(3, reference=5).tolist()
        ([-1.0, -0.5, 0.0, 0.5, 1.0], [-1.0, -0.5, 0.0])
    """
    argument_types.sizes(size=size)
    if reference is not None:
        argument_types.sizes(least=1, reference=reference)
    # linspace would specialize a compiled graph to one size. With max(size - 1, 1), a program exported by PyTorch 2.6
    # would divide by zero if there is only one token.
    indices = torch.arange(size, device=device, dtype=dtype or torch.get_default_dtype())
    is_fixed = reference is not None and not isinstance(reference, torch.SymInt)  # a symbolic size is that of the axis
    last = max(cast(int, reference) - 1, 1) if is_fixed else indices[-1:].clamp(min=1)
    return 2 * indices / last - 1


@explained
def grid_points(
    grid: Sequence[int], like: Tensor, *, reference: Sequence[int] | None = None
) -> Float[Tensor, "*grid axes"]:
    """Return the coordinates of all grid points. The last axis holds one coordinate per grid axis.

    `reference` is the size of the grid that spans [-1, 1], by default `grid`.

    Example:
        >>> pc.positions.grid_points((2, 3), like=torch.zeros(()))[1].tolist()
        [[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    check_axes(grid, len(grid), like)
    if reference is not None:
        check_axes(reference, len(grid), name="reference")
    sizes = zip(grid, grid if reference is None else reference, strict=True)
    axes = [coordinates(size, like.device, computing_dtype(like), reference=full) for size, full in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def spanned_axes(positions: object) -> tuple[bool, ...]:
    """Return, for each axis, whether the position of a token depends on the size of its input along this axis.

    The position encodings of this package have an attribute `spanned_axes` with this information. For all others, the
    result is an empty tuple: their positions are assumed not to depend on the size.
    """
    axes: tuple[bool, ...] = getattr(positions, "spanned_axes", ())
    return axes


def warn_if_padded(positions: object, mask: Tensor | None) -> None:
    """Warn, once per process, if a mask `b *grid` marks padding at the end of an axis whose size affects positions.

    The mask is examined only on the CPU in eager mode.
    """
    if mask is None or "padding" in _warned or not any(axes := spanned_axes(positions)):
        return
    if checks.is_true(lambda: not _is_padded(mask, axes), mask):
        return
    _warned.add("padding")
    warnings.warn(
        "positions span the padded input, so the position of a token changes with the padding. Wrap them in "
        "positions.FixedGrid for positions that depend only on the index of a token",
        stacklevel=4,
    )


_warned: set[str] = set()


def _is_padded(mask: Tensor, axes: Sequence[bool]) -> bool:
    """Return whether the valid tokens of any sample form a box that starts at index 0, and the sample has padding.

    Padding counts only along the axes that are True in `axes`: along one of them, the box must be smaller than the
    grid.
    """
    box, padded = torch.ones_like(mask), mask.new_zeros(mask.shape[0])
    for axis, spanned in enumerate(axes, start=1):
        valid = mask.movedim(axis, 1).reshape(mask.shape[0], mask.shape[axis], -1).any(-1)
        prefix = valid.cumprod(1).bool()  # valid up to the first invalid index
        box = box & prefix.reshape([size if i in (0, axis) else 1 for i, size in enumerate(mask.shape)])
        if spanned:
            padded = padded | (valid[:, 0] & ~valid[:, -1])
    return bool((padded & (box == mask).flatten(1).all(1)).any())


def check_axes(grid: Sequence[int], num_axes: int, like: Tensor | None = None, *, name: str = "grid") -> None:
    """Check that `grid` has `num_axes` axes, each of size 1 or more, and that `like` is floating point if it is set."""
    is_sequence = isinstance(grid, (tuple, list)) or (isinstance(grid, Sequence) and not isinstance(grid, (str, bytes)))
    if not is_sequence or len(grid) != num_axes or not all(argument_types.is_size(size, 1) for size in grid):
        got = tuple(grid) if is_sequence else argument_types.shown(grid)
        raise ValueError(f"{name} must have {num_axes} axes of at least one token; got {got}")
    if like is not None:
        checks.is_floating("like", like)


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
