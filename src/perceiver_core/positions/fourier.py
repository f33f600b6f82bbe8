"""Fourier features of positions in [-1, 1]: the paper's, and the other published variants by name.

The separable ones (`Fourier`, `FourierPerAxis`, `NeRF`) give a grid one small table an axis. They differ in
frequencies and in the order of their columns, which matters to anyone who loads weights trained with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions.grid import check_axes, computing_dtype, grid_points, separable_features, separable_tables
from perceiver_core.registry import register


@register
class Fourier(nn.Module):
    """The Fourier features of the Perceiver's published code.

    For band k of K along an axis: sin(pi f_k x) and cos(pi f_k x), f_k evenly spaced from 1 to
    max_resolution / 2, ends included. Columns: [x of every axis, sines axis by axis, cosines axis by axis].

    Args:
        num_axes: how many coordinates a position has.
        num_bands: K, the number of frequencies an axis.
        max_resolution: how many samples along an axis (or along each) the highest band resolves: its
            Nyquist frequency is half of this. Usually the size that the model is trained at; it does not
            follow the input, so features mean the same at every size.
        concat_positions: whether the raw coordinates come first.
        sine_only: leave the cosines out.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import Fourier
        >>> where = Fourier(num_axes=2, num_bands=64, max_resolution=224)
        >>> where.dim, where(torch.rand(5, 100, 2) * 2 - 1).shape
        (258, torch.Size([5, 100, 258]))
        >>> [tuple(table.shape) for table in where.tables((224, 112), like=torch.zeros(()))]
        [(224, 1, 258), (1, 112, 258)]

    Reference: Jaegle et al. 2021 (Perceiver), section 3.2; deepmind-research/perceiver/position_encoding.py,
    `generate_fourier_features`.
    """

    def __init__(
        self,
        num_axes: int,
        num_bands: int = 64,
        *,
        max_resolution: float | Sequence[float] = 224,
        concat_positions: bool = True,
        sine_only: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(num_axes, num_bands=num_bands)
        self.num_axes, self.num_bands = num_axes, num_bands
        self.max_resolution = per_axis("max_resolution", max_resolution, num_axes)
        self.concat_positions, self.sine_only = concat_positions, sine_only

    @property
    def dim(self) -> int:
        """The width of the features."""
        return self.num_axes * (self.concat_positions + self.num_bands * (1 if self.sine_only else 2))

    def forward(self, points: Float[Tensor, "*b axes"]) -> Float[Tensor, "*b dim"]:
        """The features of any points; coordinates in [-1, 1]."""
        return separable_features(self._features, widened(points, self.num_axes)).to(points.dtype)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """One table an axis for a grid; their sum is `forward` at its points."""
        check_axes(grid, self.num_axes)
        return separable_tables(self._features, grid, like)

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        frequencies = linear_bands(self.max_resolution[axis] / 2, self.num_bands, x)
        angles = math.pi * x[..., None] * frequencies
        groups = [x[..., None]] if self.concat_positions else []
        return groups + ([angles.sin()] if self.sine_only else [angles.sin(), angles.cos()])

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"axes={self.num_axes}, bands={self.num_bands}, max_resolution={self.max_resolution}"


@register
class FourierPerAxis(nn.Module):
    """Fourier features axis by axis, [sines, cosines, x] each: the order and bands of perceiver-pytorch.

    Args:
        num_axes: how many coordinates a position has.
        num_bands: the number of frequencies an axis, evenly spaced from 1 to max_frequency / 2.
        max_frequency: one for all axes.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import FourierPerAxis
        >>> FourierPerAxis(num_axes=2, num_bands=6, max_frequency=10.0)(torch.rand(7, 2)).shape
        torch.Size([7, 26])

    Reference: lucidrains/perceiver-pytorch, `fourier_encode`.
    """

    def __init__(self, num_axes: int, num_bands: int = 6, *, max_frequency: float = 10.0) -> None:
        super().__init__()
        _check_sizes(num_axes, num_bands=num_bands)
        self.num_axes, self.num_bands, self.max_frequency = num_axes, num_bands, max_frequency

    @property
    def dim(self) -> int:
        """The width of the features."""
        return self.num_axes * (2 * self.num_bands + 1)

    def forward(self, points: Float[Tensor, "*b axes"]) -> Float[Tensor, "*b dim"]:
        """The features of any points; coordinates in [-1, 1]."""
        return separable_features(self._features, widened(points, self.num_axes)).to(points.dtype)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """One table an axis for a grid; their sum is `forward` at its points."""
        check_axes(grid, self.num_axes)
        return separable_tables(self._features, grid, like)

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        angles = math.pi * x[..., None] * linear_bands(self.max_frequency / 2, self.num_bands, x)
        return [torch.cat([angles.sin(), angles.cos(), x[..., None]], dim=-1)]


@register
class NeRF(nn.Module):
    """Sines and cosines at octaves: sin(2^k pi x), cos(2^k pi x) for k = 0 ... bands - 1, axis by axis.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import NeRF
        >>> NeRF(num_axes=3, num_bands=10)(torch.rand(7, 3)).shape
        torch.Size([7, 60])

    Reference: Mildenhall et al. 2020 (NeRF), equation 4.
    """

    def __init__(self, num_axes: int, num_bands: int = 10) -> None:
        super().__init__()
        _check_sizes(num_axes, num_bands=num_bands)
        self.num_axes, self.num_bands = num_axes, num_bands

    @property
    def dim(self) -> int:
        """The width of the features."""
        return self.num_axes * 2 * self.num_bands

    def forward(self, points: Float[Tensor, "*b axes"]) -> Float[Tensor, "*b dim"]:
        """The features of any points; coordinates in [-1, 1]."""
        return separable_features(self._features, widened(points, self.num_axes)).to(points.dtype)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """One table an axis for a grid; their sum is `forward` at its points."""
        check_axes(grid, self.num_axes)
        return separable_tables(self._features, grid, like)

    def _features(self, x: Tensor, axis: int) -> list[Tensor]:
        octaves = 2.0 ** torch.arange(self.num_bands, device=x.device, dtype=computing_dtype(x))
        angles = math.pi * x[..., None] * octaves
        return [torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)]


@register
class Gaussian(nn.Module):
    """Random Fourier features [cos(2 pi B x), sin(2 pi B x)], B drawn once from N(0, scale^2) and saved.

    Not separable: each feature mixes all axes, so a grid has one table of its full size.

    Args:
        num_axes: how many coordinates a position has.
        num_features: how many frequency vectors; the width is twice that.
        scale: the standard deviation of a frequency; higher resolves finer detail.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import Gaussian
        >>> where = Gaussian(num_axes=2, num_features=32, scale=10.0)
        >>> where(torch.rand(7, 2)).shape, where.tables((3, 5), like=torch.zeros(()))[0].shape
        (torch.Size([7, 64]), torch.Size([3, 5, 64]))

    Reference: Tancik et al. 2020 (Fourier features), section 5.
    """

    frequencies: Tensor

    def __init__(self, num_axes: int, num_features: int = 64, *, scale: float = 10.0) -> None:
        super().__init__()
        _check_sizes(num_axes, num_features=num_features)
        self.num_axes = num_axes
        self.register_buffer("frequencies", torch.randn(num_axes, num_features) * scale)

    @property
    def dim(self) -> int:
        """The width of the features."""
        return 2 * self.frequencies.shape[1]

    def forward(self, points: Float[Tensor, "*b axes"]) -> Float[Tensor, "*b dim"]:
        """The features of any points; coordinates in [-1, 1]."""
        wide = widened(points, self.num_axes)
        # Not a matrix product, which autocast would take to half precision.
        angles = 2 * math.pi * (wide[..., None] * self.frequencies.to(wide)).sum(-2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(points.dtype)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "*grid p"], ...]:
        """One table over the whole grid."""
        check_axes(grid, self.num_axes)
        return (self(grid_points(grid, like)).to(like.dtype),)


def _check_sizes(axes: int, **features: int) -> None:
    """Bounds far above any use, so that a hostile configuration cannot ask for a list of every column."""
    checks.positive(at_most=16, axes=axes)
    checks.positive(at_most=65_536, **features)


def linear_bands(highest: float, bands: int, like: Tensor) -> Float[Tensor, " bands"]:
    """Frequencies evenly spaced from 1 to `highest`, ends included."""
    return torch.linspace(1.0, highest, bands, device=like.device, dtype=computing_dtype(like))


def per_axis(name: str, value: float | Sequence[float], axes: int) -> tuple[float, ...]:
    """One positive value for every axis, from one for all or a sequence.

    Raises:
        ValueError: a sequence of another length, or a value that is not positive.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes or any(v <= 0 for v in values):
        raise ValueError(f"{name} must be positive, one number or one for each of {axes} axes; got {value}")
    return values


def widened(points: Tensor, axes: int) -> Tensor:
    """Points in the dtype that features are computed in; raises unless each has `axes` floating point coordinates."""
    checks.is_floating("points", points)
    if points.ndim < 1 or points.shape[-1] != axes:
        raise ValueError(f"points must have {axes} coordinates in the last axis; got shape {tuple(points.shape)}")
    return points.to(computing_dtype(points))
