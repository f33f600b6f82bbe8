"""Fourier features of coordinates in [-1, 1]: the variant of the Perceiver paper and other published variants.

`Fourier`, `FourierPerAxis` and `NeRF` are separable: each feature depends on a single coordinate, so the features of a
grid need only one small table per axis. The variants differ in their frequencies and in the order of the features. For
pretrained weights, use the variant that the weights were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from perceiver_core import checks
from perceiver_core.argument_errors import explained
from perceiver_core.positions.grid import check_axes, computing_dtype, coordinates, grid_points
from perceiver_core.registry import register


class SeparableFeatures(nn.Module):
    """Base class of position features that are computed separately for each axis."""

    dim: int
    _called_with = "points"
    _hyperparameters: tuple[str, ...]  # attributes besides num_bands that determine the features

    def __init__(self, num_axes: int, num_bands: int) -> None:
        super().__init__()
        _check_sizes(num_axes, num_bands=num_bands)
        self.num_axes, self.num_bands = num_axes, num_bands
        self.spanned_axes = (True,) * num_axes

    @explained
    def forward(self, points: Float[Tensor, "*b axes"]) -> Float[Tensor, "*b dim"]:
        """Return the features of points with coordinates in [-1, 1].

        They are ordered by group, then by axis: for example, [sines of x, sines of y, cosines of x, cosines of y].
        """
        axes = [self._features(x, axis) for axis, x in enumerate(_widened(points, self.num_axes).unbind(-1))]
        return torch.cat([part for group in zip(*axes, strict=True) for part in group], dim=-1).to(points.dtype)

    @explained
    def tables(
        self, grid: Sequence[int], like: Tensor, *, reference: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "... p"], ...]:
        """Return one position table per grid axis. Their broadcast sum equals `forward` at the grid points.

        The tables of small grids are cached, because computing them would dominate the runtime of a small model.

        Args:
            grid: Grid size.
            like: Tensor with the dtype and device of the tables.
            reference: Size of the grid that spans [-1, 1]; `grid` by default.
        """
        check_axes(grid, self.num_axes, like)
        if reference is not None:
            check_axes(reference, self.num_axes, name="reference")
        reference = tuple(grid if reference is None else reference)
        if (
            type(like) is not Tensor
            or torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None
            or sum(grid) > CACHED_ROWS
            or torch._C._functorch.peek_interpreter_stack() is not None
            or (like.device.type == "cuda" and torch.cuda.is_current_stream_capturing())  # no values before replay
        ):
            return self._compute_tables(grid, like, reference)
        settings = [getattr(self, name) for name in self._hyperparameters]
        key = (type(self), self.num_bands, *settings, tuple(grid), reference, like.dtype, like.device)
        cached = _cache.get(key, ())
        if cached and all(table._version == version and not table.requires_grad for table, version in cached):
            return tuple([table for table, _ in cached])
        with torch.inference_mode(False):  # autograd could not save an inference tensor
            tables = self._compute_tables(grid, like, reference)
        if sum(table.numel() for table in tables) <= CACHED_NUMBERS:
            if len(_cache) >= CACHED_GRIDS:
                _cache.clear()
            _cache[key] = tuple([(table, table._version) for table in tables])
        return tables

    def _compute_tables(self, grid: Sequence[int], like: Tensor, reference: Sequence[int]) -> tuple[Tensor, ...]:
        """Return one table per axis, of shape `1 ... size ... 1 p`, in which the features of other axes are zero."""
        tables = []
        for axis, (size, full) in enumerate(zip(grid, reference, strict=True)):
            x = coordinates(size, like.device, computing_dtype(like), reference=full)
            groups = self._features(x, axis)
            others = self.num_axes - 1 - axis
            own = torch.cat([F.pad(g, (axis * g.shape[-1], others * g.shape[-1])) for g in groups], dim=-1)
            tables.append(own.to(like.dtype).reshape(*[1] * axis, size, *[1] * others, own.shape[-1]))
        return tuple(tables)

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return the features of coordinates `*b` along an axis as a list of groups `*b f`, such as [sines, cosines].

        The number f of features in a group must not depend on the axis.
        """
        raise NotImplementedError


# Limits of the table cache: number of grids, sum of a grid's axis sizes, numbers in its tables. 16 MiB in float32.
CACHED_GRIDS, CACHED_ROWS, CACHED_NUMBERS = 64, 512, 2**16
_cache: dict[tuple[object, ...], tuple[tuple[Tensor, int], ...]] = {}
"""Cached tables, each with its version counter to detect in-place edits. Keyed by settings, grids, dtype and device."""


@register
class Fourier(SeparableFeatures):
    """Fourier features as in the Perceiver's published code.

    A coordinate x has the features sin(pi f_k x) and cos(pi f_k x) for k = 1 ... K. The frequencies f_k are evenly
    spaced from 1 to max_resolution / 2, endpoints included. The features are ordered as [coordinates, sines axis by
    axis, cosines axis by axis].

    Args:
        num_axes: Number of coordinates per position.
        num_bands: Number of frequencies K per axis.
        max_resolution: Twice the highest frequency f_K, so that f_K is the Nyquist frequency of a grid of this size.
            One number for all axes, or one per axis. Usually the grid size in training. It stays the same for all input
            sizes, so that features have the same meaning for all inputs.
        concat_positions: Whether to include the raw coordinates.
        sine_only: Whether to omit the cosines.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=224)
        >>> positions.dim, positions(torch.rand(5, 100, 2) * 2 - 1).shape
        (258, torch.Size([5, 100, 258]))
        >>> [tuple(table.shape) for table in positions.tables((224, 112), like=torch.zeros(()))]
        [(224, 1, 258), (1, 112, 258)]

    Reference: Jaegle et al. 2021 (Perceiver), section 3.2; deepmind-research/perceiver/position_encoding.py,
    `generate_fourier_features`.
    """

    _hyperparameters = ("max_resolution", "concat_positions", "sine_only")

    def __init__(
        self,
        num_axes: int,
        num_bands: int = 64,
        *,
        max_resolution: float | Sequence[float] = 224,
        concat_positions: bool = True,
        sine_only: bool = False,
    ) -> None:
        super().__init__(num_axes, num_bands)
        values = tuple(max_resolution) if isinstance(max_resolution, Sequence) else (max_resolution,) * num_axes
        if len(values) != num_axes or any(value <= 0 for value in values):
            raise ValueError(
                f"max_resolution must be positive, one number or one for each of {num_axes} axes; got {max_resolution}"
            )
        self.max_resolution, self.concat_positions, self.sine_only = values, concat_positions, sine_only
        self.dim = num_axes * (concat_positions + num_bands * (1 if sine_only else 2))

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        angles = math.pi * x[..., None] * linear_bands(self.max_resolution[axis] / 2, self.num_bands, x)
        groups = [x[..., None]] if self.concat_positions else []
        return groups + ([angles.sin()] if self.sine_only else [angles.sin(), angles.cos()])

    def extra_repr(self) -> str:
        """Return the settings to show in `repr`."""
        return f"num_axes={self.num_axes}, num_bands={self.num_bands}, max_resolution={self.max_resolution}"


@register
class FourierPerAxis(SeparableFeatures):
    """Fourier features with the frequencies and order of perceiver-pytorch: [sines, cosines, x] for each coordinate x.

    Args:
        num_axes: Number of coordinates per position.
        num_bands: Number of frequencies per axis, evenly spaced from 1 to max_frequency / 2.
        max_frequency: Twice the highest frequency, for all axes.

    Example:
        >>> pc.positions.FourierPerAxis(num_axes=2, num_bands=6, max_frequency=10.0)(torch.rand(7, 2)).shape
        torch.Size([7, 26])

    Reference: lucidrains/perceiver-pytorch, `fourier_encode`.
    """

    _hyperparameters = ("max_frequency",)

    def __init__(self, num_axes: int, num_bands: int = 6, *, max_frequency: float = 10.0) -> None:
        super().__init__(num_axes, num_bands)
        self.max_frequency = max_frequency
        self.dim = num_axes * (2 * num_bands + 1)

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        angles = math.pi * x[..., None] * linear_bands(self.max_frequency / 2, self.num_bands, x)
        return [torch.cat([angles.sin(), angles.cos(), x[..., None]], dim=-1)]


@register
class NeRF(SeparableFeatures):
    """NeRF's position encoding: interleaved sin(2^k pi x) and cos(2^k pi x) for each coordinate x and k < num_bands.

    Example:
        >>> pc.positions.NeRF(num_axes=3, num_bands=10)(torch.rand(7, 3)).shape
        torch.Size([7, 60])

    Reference: Mildenhall et al. 2020 (NeRF), equation 4.
    """

    _hyperparameters = ()

    def __init__(self, num_axes: int, num_bands: int = 10) -> None:
        super().__init__(num_axes, num_bands)
        self.dim = num_axes * 2 * num_bands

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        octaves = 2.0 ** torch.arange(self.num_bands, device=x.device, dtype=computing_dtype(x))
        angles = math.pi * x[..., None] * octaves
        return [torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)]


@register
class Gaussian(nn.Module):
    """Random Fourier features [cos(2 pi B x), sin(2 pi B x)] of a point x, with a random matrix B.

    The entries of B are drawn from N(0, scale^2) at construction and stored in a buffer, which stays in float32 if the
    model is converted to half precision. Each feature depends on all coordinates, so the features are not separable: a
    grid needs one table of its full size.

    Args:
        num_axes: Number of coordinates per position.
        num_features: Number of random frequency vectors (rows of B). The feature width `dim` is twice this number.
        scale: Standard deviation of the frequencies. Higher values resolve finer detail.

    Example:
        >>> positions = pc.positions.Gaussian(num_axes=2, num_features=32, scale=10.0)
        >>> positions(torch.rand(7, 2)).shape, positions.tables((3, 5), like=torch.zeros(()))[0].shape
        (torch.Size([7, 64]), torch.Size([3, 5, 64]))

    Reference: Tancik et al. 2020 (Fourier features), section 5.
    """

    _called_with = "points"
    frequencies: Tensor

    def __init__(self, num_axes: int, num_features: int = 64, *, scale: float = 10.0) -> None:
        super().__init__()
        _check_sizes(num_axes, num_features=num_features)
        self.num_axes, self.dim = num_axes, 2 * num_features
        self.spanned_axes = (True,) * num_axes
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("frequencies", torch.randn(num_axes, num_features, dtype=dtype) * scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gaussian:
        # `.to()` and `.bfloat16()` call this method. Rounding the frequencies would change the features permanently.
        before = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.frequencies
        dtype = torch.promote_types(after.dtype, torch.float32)
        if after.dtype != dtype:
            self.frequencies = (after if before.is_meta else before).to(after.device, dtype)
        return self

    def forward(self, points: Float[Tensor, "*b axes"]) -> Float[Tensor, "*b dim"]:
        """Return the features of points with coordinates in [-1, 1]."""
        wide = _widened(points, self.num_axes)
        # A sum of products, because autocast would compute a matrix product in half precision.
        angles = 2 * math.pi * (wide[..., None] * self.frequencies.to(wide)).sum(-2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(points.dtype)

    def tables(
        self, grid: Sequence[int], like: Tensor, *, reference: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "*grid p"], ...]:
        """Return a tuple with a single position table: the features of all grid points.

        `reference` is the size of the grid that spans [-1, 1], by default `grid`.
        """
        check_axes(grid, self.num_axes, like)
        return (self(grid_points(grid, like, reference=reference)).to(like.dtype),)


def _check_sizes(num_axes: int, **sizes: int) -> None:
    """Check that sizes are positive and within fixed limits, so that a malicious config cannot request huge tables."""
    checks.positive(at_most=16, num_axes=num_axes)
    checks.positive(at_most=65_536, **sizes)


def linear_bands(highest: float, num_bands: int, like: Tensor) -> Float[Tensor, " bands"]:
    """Return `num_bands` frequencies, evenly spaced from 1 to `highest` inclusive, in float32 or wider."""
    return torch.linspace(1.0, highest, num_bands, device=like.device, dtype=computing_dtype(like))


def _widened(points: Tensor, num_axes: int) -> Tensor:
    """Check that points have `num_axes` coordinates, and return the points in float32 or wider."""
    checks.is_floating("points", points)
    if points.ndim < 1 or points.shape[-1] != num_axes:
        raise ValueError(f"points must have {num_axes} coordinates in the last axis; got shape {tuple(points.shape)}")
    return points.to(computing_dtype(points))
