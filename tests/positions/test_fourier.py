"""Fourier features against the published formulas and against other implementations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from perceiver_core.positions import Fourier, FourierPerAxis, Gaussian, NeRF, grid_points
from perceiver_core.positions.fourier import linear_bands

LIKE = torch.zeros((), dtype=torch.float64)
GRIDS = [((13,), (11.0,)), ((5, 7), (5.0, 7.0)), ((7, 3), (224.0, 112.0)), ((2, 3, 5), (16.0, 56.0, 40.0))]
shapes = pytest.mark.parametrize(("grid", "resolution"), GRIDS, ids=[str(grid) for grid, _ in GRIDS])
options = pytest.mark.parametrize(
    ("concat", "sine_only"), [(True, False), (False, False), (True, True), (False, True)], ids=str
)


def published(points: np.ndarray, bands: int, resolution: Sequence[float], concat: bool, sine_only: bool) -> np.ndarray:
    """[pos, sin(pi f pos), cos(pi f pos)] with f = linspace(1, res / 2, K); points are n x axes."""
    bands_of = [np.linspace(1.0, r / 2, bands) for r in resolution]
    angles = np.concatenate([np.pi * points[:, [a]] * f for a, f in enumerate(bands_of)], axis=1)
    waves = [np.sin(angles)] if sine_only else [np.sin(angles), np.cos(angles)]
    return np.concatenate([points, *waves] if concat else waves, axis=1)


def numpy_grid(grid: Sequence[int]) -> np.ndarray:
    axes = [np.linspace(-1.0, 1.0, n) if n > 1 else np.array([-1.0]) for n in grid]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(grid))


def written_out(tables: tuple[Tensor, ...], grid: Sequence[int]) -> Tensor:
    total = sum(tables[1:], start=tables[0])
    return total.expand(*grid, total.shape[-1]).flatten(0, -2)


@shapes
@options
def test_fourier_equals_the_published_formula(
    grid: tuple[int, ...], resolution: tuple[float, ...], concat: bool, sine_only: bool
) -> None:
    where = Fourier(len(grid), 6, max_resolution=resolution, concat_positions=concat, sine_only=sine_only)
    expected = torch.from_numpy(published(numpy_grid(grid), 6, resolution, concat, sine_only))
    assert expected.shape[-1] == where.dim
    torch.testing.assert_close(written_out(where.tables(grid, LIKE), grid), expected, rtol=0.0, atol=1e-10)
    points = torch.rand(17, len(grid), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    expected = torch.from_numpy(published(points.numpy(), 6, resolution, concat, sine_only))
    torch.testing.assert_close(where(points), expected, rtol=0.0, atol=1e-10)


@shapes
@options
def test_fourier_equals_transformers(
    grid: tuple[int, ...], resolution: tuple[float, ...], concat: bool, sine_only: bool
) -> None:
    peer = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
    theirs = peer.PerceiverFourierPositionEncoding(6, resolution, concat_pos=concat, sine_only=sine_only)
    where = Fourier(len(grid), 6, max_resolution=resolution, concat_positions=concat, sine_only=sine_only)
    assert where.dim == theirs.output_size()
    expected = theirs(list(grid), batch_size=2, device=torch.device("cpu"), dtype=torch.float32)
    expected = expected.expand(2, -1, -1)[1]  # without positions, theirs has no batch axis
    actual = written_out(where.tables(grid, LIKE.float()), grid)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-4)  # angles of 350 in float32
    points = torch.rand(1, 17, len(grid), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    expected = peer.generate_fourier_features(points, 6, resolution, concat_pos=concat, sine_only=sine_only)
    # Their bands are computed in float32.
    torch.testing.assert_close(where(points[0]), expected.expand(1, -1, -1)[0], rtol=0.0, atol=1e-4)


def test_features_do_not_depend_on_the_size_of_the_input() -> None:
    """A position has the same features in a grid of any size."""
    where = Fourier(num_axes=1, num_bands=5, max_resolution=9)
    (small,), (large,) = where.tables((5,), LIKE), where.tables((9,), LIKE)
    torch.testing.assert_close(large[::2], small, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("axes", "bands", "expected"), [(1, 1, 3), (2, 64, 258), (3, 5, 33)])
def test_the_width_of_fourier(axes: int, bands: int, expected: int) -> None:
    assert Fourier(axes, bands).dim == expected
    assert Fourier(axes, bands, sine_only=True).dim == axes * (1 + bands)
    assert Fourier(axes, bands, concat_positions=False).dim == expected - axes


def test_defaults_are_those_of_the_paper_for_imagenet() -> None:
    assert repr(Fourier(2)) == "Fourier(num_axes=2, num_bands=64, max_resolution=(224, 224))"


def test_linear_bands_include_both_ends() -> None:
    torch.testing.assert_close(linear_bands(4.0, 4, LIKE), torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    assert linear_bands(7.0, 1, LIKE).tolist() == [1.0]
    assert linear_bands(7.0, 3, LIKE.bfloat16()).dtype == torch.float32


def test_one_resolution_applies_to_every_axis() -> None:
    one, both = Fourier(2, 3, max_resolution=19), Fourier(2, 3, max_resolution=[19, 19])
    points = grid_points((3, 5), LIKE)
    assert torch.equal(one(points), both(points))
    other = Fourier(2, 3, max_resolution=[19, 23])
    assert not torch.equal(one(points), other(points))


@pytest.mark.refusal
@pytest.mark.parametrize("value", [(7.0,), (7.0, 5.0, 3.0), 0.0, -1.0, (7.0, 0.0), ()], ids=str)
def test_invalid_resolutions_raise(value: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="max_resolution must be positive, one number or one for each of 2 axes; got "):
        Fourier(2, 3, max_resolution=value)


def test_max_resolution_is_one_value_per_axis() -> None:
    assert Fourier(2, max_resolution=3).max_resolution == (3, 3)
    assert Fourier(2, max_resolution=[3.0, 5.0]).max_resolution == (3.0, 5.0)


@pytest.mark.refusal
@pytest.mark.parametrize("kind", [Fourier, FourierPerAxis, NeRF, Gaussian])
def test_counts_that_are_not_positive_raise(kind: type) -> None:
    count = "features" if kind is Gaussian else "bands"
    with pytest.raises(ValueError, match="axes must be a whole number of at least 1; got 0"):
        kind(0)
    with pytest.raises(ValueError, match=f"{count} must be a whole number of at least 1; got 0"):
        kind(2, 0)


@pytest.mark.parametrize(("grid", "bands", "frequency"), [((13,), 6, 10.0), ((5, 7), 4, 23.0), ((2, 3, 5), 1, 7.0)])
def test_fourier_per_axis_equals_perceiver_pytorch(grid: tuple[int, ...], bands: int, frequency: float) -> None:
    peer = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    points = grid_points(grid, LIKE)
    expected = peer.fourier_encode(points, frequency, bands).flatten(-2)
    where = FourierPerAxis(len(grid), bands, max_frequency=frequency)
    assert expected.shape[-1] == where.dim
    torch.testing.assert_close(where(points), expected, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(
        written_out(where.tables(grid, LIKE), grid), expected.flatten(0, -2), rtol=0.0, atol=1e-10
    )


def test_nerf_is_equation_4() -> None:
    point = [0.37, -0.81, 0.05]
    expected = [wave(2.0**k * math.pi * x) for x in point for k in range(4) for wave in (math.sin, math.cos)]
    actual = NeRF(num_axes=3, num_bands=4)(torch.tensor(point, dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_gaussian_equals_cosines_and_sines_of_random_directions() -> None:
    torch.manual_seed(0)
    where = Gaussian(num_axes=3, num_features=5, scale=2.0)
    points = torch.rand(7, 3, dtype=torch.float64)
    angles = 2 * np.pi * points.numpy() @ where.frequencies.double().numpy()
    expected = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    torch.testing.assert_close(where(points), expected, rtol=0.0, atol=1e-12)
    (table,) = where.tables((2, 3, 5), LIKE)
    assert table.shape == (2, 3, 5, 10)
    torch.testing.assert_close(table, where(grid_points((2, 3, 5), LIKE)), rtol=0.0, atol=0.0)


def test_gaussian_frequencies_are_normal_fixed_and_saved() -> None:
    torch.manual_seed(0)
    where = Gaussian(num_axes=2, num_features=10_007, scale=3.0)
    assert abs(where.frequencies.std().item() / 3.0 - 1.0) < 0.02
    assert abs(where.frequencies.mean().item()) < 0.1
    assert list(where.state_dict()) == ["frequencies"] and not list(where.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gaussian_tables_are_float32_ones_rounded(dtype: torch.dtype) -> None:
    where = Gaussian(num_axes=2, num_features=7)
    (half,), (full,) = where.tables((5, 7), LIKE.to(dtype)), where.tables((5, 7), LIKE.float())
    assert torch.equal(half, full.to(dtype))


def test_gradients_reach_the_points() -> None:
    points = torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    for where in (Fourier(2, 3, max_resolution=7), FourierPerAxis(2, 3), NeRF(2, 3), Gaussian(2, 3, scale=1.0)):
        assert torch.autograd.gradcheck(where, points)
