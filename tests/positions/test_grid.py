"""Coordinates of grids, and the law of all separable positions: tables sum to features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perceiver_core import positions
from perceiver_core.positions import Fourier, FourierPerAxis, Gaussian, LearnedGrid, NeRF, coordinates, grid_points
from perceiver_core.positions.grid import check_axes, computing_dtype

LIKE = torch.zeros((), dtype=torch.float64)

laws = settings(max_examples=40, derandomize=True, deadline=None, database=None)
grids = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)

SEPARABLE = {
    "fourier": lambda axes: Fourier(axes, num_bands=5, max_resolution=[7.0, 23.0, 11.0][:axes]),
    "fourier, sine only": lambda axes: Fourier(axes, num_bands=3, max_resolution=13, sine_only=True),
    "fourier, no positions": lambda axes: Fourier(axes, num_bands=3, max_resolution=13, concat_positions=False),
    "per axis": lambda axes: FourierPerAxis(axes, num_bands=3, max_frequency=17.0),
    "nerf": lambda axes: NeRF(axes, num_bands=4),
}
separable = pytest.mark.parametrize("make", SEPARABLE.values(), ids=SEPARABLE.keys())


def total(tables: tuple[Tensor, ...], grid: tuple[int, ...]) -> Tensor:
    added = sum(tables[1:], start=tables[0])
    return added.expand(*grid, added.shape[-1])


def test_coordinates_run_from_minus_one_to_one() -> None:
    torch.testing.assert_close(coordinates(4, dtype=torch.float64), torch.tensor([-3.0, -1.0, 1.0, 3.0]).double() / 3)
    assert coordinates(1).tolist() == [-1.0]
    assert coordinates(3, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_grid_points_vary_the_last_axis_fastest() -> None:
    points = grid_points((2, 3, 5), LIKE)
    assert points.shape == (2, 3, 5, 3)
    for axis, size in enumerate((2, 3, 5)):
        along = points[..., axis].movedim(axis, -1)
        torch.testing.assert_close(along, coordinates(size, dtype=torch.float64).expand_as(along), rtol=0.0, atol=1e-15)
    assert points.flatten(0, 2)[1].tolist() == [-1.0, -1.0, -0.5]


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_coordinates_are_computed_in_float32(dtype: torch.dtype, computed: torch.dtype) -> None:
    assert computing_dtype(torch.zeros((), dtype=dtype)) == computed
    assert grid_points((2, 3), torch.zeros((), dtype=dtype)).dtype == computed


@separable
@laws
@given(grid=grids)
def test_tables_sum_to_the_features_of_every_point(make, grid: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    where = make(len(grid))
    tables = where.tables(grid, LIKE)
    torch.testing.assert_close(total(tables, grid), where(grid_points(grid, LIKE)), rtol=0.0, atol=1e-12)


@separable
def test_a_table_is_small_and_zero_outside_its_own_columns(make) -> None:  # type: ignore[no-untyped-def]
    grid = (5, 7, 11)
    where = make(3)
    tables = where.tables(grid, LIKE)
    assert [tuple(t.shape) for t in tables] == [(5, 1, 1, where.dim), (1, 7, 1, where.dim), (1, 1, 11, where.dim)]
    used = torch.stack([t.flatten(0, -2).any(0) for t in tables])
    assert (used.sum(0) == 1).all()  # every column belongs to one axis
    assert (used.sum(1) == where.dim // 3).all()


@separable
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tables_are_float32_ones_rounded(make, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    where, grid = make(2), (29, 31)
    for half, full in zip(
        where.tables(grid, torch.zeros((), dtype=dtype)), where.tables(grid, torch.zeros(())), strict=True
    ):
        assert half.dtype == dtype and full.dtype == torch.float32
        assert torch.equal(half, full.to(dtype))


EVERY = {**SEPARABLE, "gaussian": lambda axes: Gaussian(axes, num_features=5)}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_points_are_computed_in_float32_and_rounded(make, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    where = make(2)
    points = (torch.rand(101, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    assert torch.equal(where(points), where(points.float()).to(dtype))


@every
def test_autocast_does_not_touch_positions(make) -> None:  # type: ignore[no-untyped-def]
    where = make(2)
    points = torch.rand(101, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected, tables = where(points), where.tables((5, 7), LIKE.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(where(points), expected)
        assert all(torch.equal(a, b) for a, b in zip(where.tables((5, 7), LIKE.float()), tables, strict=True))


@every
@pytest.mark.parametrize("shape", [(2,), (3, 2), (3, 5, 7, 2), (0, 2)], ids=str)
def test_points_have_any_leading_shape(make, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    where = make(2)
    points = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = where(points)
    assert features.shape == (*shape[:-1], where.dim)
    one_by_one = [where(point) for point in points.reshape(-1, 2)]
    for actual, expected in zip(features.reshape(-1, where.dim), one_by_one, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@pytest.mark.refusal
@every
def test_invalid_points_raise(make) -> None:  # type: ignore[no-untyped-def]
    where = make(2)
    with pytest.raises(ValueError, match=r"points must have 2 coordinates in the last axis; got shape \(5, 3\)"):
        where(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"points must have 2 coordinates in the last axis; got shape \(\)"):
        where(torch.zeros(()))
    with pytest.raises(TypeError, match=r"points must be floating point; got torch\.int64"):
        where(torch.zeros(5, 2, dtype=torch.int64))


POSITIONS = {**EVERY, "learned": lambda axes: LearnedGrid((3, 5, 7)[:axes], dim=11)}


@pytest.mark.refusal
@pytest.mark.parametrize("make", POSITIONS.values(), ids=POSITIONS.keys())
def test_invalid_grids_raise(make) -> None:  # type: ignore[no-untyped-def]
    where = make(2)
    for grid in ((5,), (5, 7, 3), (), (5, 0)):
        with pytest.raises(ValueError, match=r"grid must have 2 axes of at least one token; got \("):
            where.tables(grid, LIKE)


@pytest.mark.parametrize("make", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_all_positions_satisfy_the_protocol(make, axes: int) -> None:  # type: ignore[no-untyped-def]
    where, grid = make(axes), (2, 3, 5)[:axes]
    assert isinstance(where, positions.Positions) and where.num_axes == axes
    tables = where.tables(grid, LIKE)
    assert all(t.dtype == torch.float64 and t.ndim == axes + 1 for t in tables)
    assert total(tables, grid).shape == (*grid, where.dim)


def test_a_plain_module_does_not_satisfy_the_protocol() -> None:
    assert not isinstance(nn.Identity(), positions.Positions)


def test_check_axes_raises_for_another_number_of_axes() -> None:
    check_axes((1, 2), 2)
    with pytest.raises(ValueError, match=r"grid must have 1 axes of at least one token; got \(2, 3\)"):
        check_axes((2, 3), 1)
