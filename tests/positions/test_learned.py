"""Learned positions: arrays, resampled with aligned ends at other sizes; vectors by index; and projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.positions import Fourier, LearnedEmbedding, LearnedGrid, Projected, grid_points

LIKE = torch.zeros((), dtype=torch.float64)


def random(grid: tuple[int, ...], dim: int = 3) -> LearnedGrid:
    torch.manual_seed(0)
    return LearnedGrid(grid, dim).double()


def holding(grid: tuple[int, ...], values: torch.Tensor) -> LearnedGrid:
    where = LearnedGrid(grid, values.shape[-1]).double()
    with torch.no_grad():
        where.vectors.copy_(values)
    return where


@pytest.mark.parametrize("grid", [(5,), (5, 7), (2, 3, 5), (1, 7)], ids=str)
def test_at_its_own_size_the_table_is_the_array(grid: tuple[int, ...]) -> None:
    where = random(grid)
    (table,) = where.tables(grid, LIKE)
    assert torch.equal(table, where.vectors)
    assert (where.num_axes, where.dim, tuple(where.vectors.shape)) == (len(grid), 3, (*grid, 3))


@pytest.mark.parametrize(
    ("grid", "new"),
    [((5,), (11,)), ((5,), (2,)), ((7,), (1,)), ((3, 5, 7), (5, 11, 2)), ((3, 5, 7), (2, 3, 13))],
    ids=str,
)
def test_a_ramp_stays_a_ramp_on_one_and_three_axes(grid: tuple[int, ...], new: tuple[int, ...]) -> None:
    slopes = torch.randn(len(grid), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    where = holding(grid, grid_points(grid, LIKE) @ slopes)
    (table,) = where.tables(new, LIKE)
    torch.testing.assert_close(table, grid_points(new, LIKE) @ slopes, rtol=0.0, atol=1e-12)


def cubic_convolution(size: int, new: int) -> np.ndarray:
    """Matrix (new x size) of Keys' cubic convolution (a = -0.75), with aligned ends and repeated edges."""
    a, matrix = -0.75, np.zeros((new, size))
    for i in range(new):
        x = i * (size - 1) / max(new - 1, 1)
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            t = abs(x - j)
            near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
            matrix[i, min(max(j, 0), size - 1)] += near if t <= 1 else far if t < 2 else 0.0
    return matrix


@pytest.mark.parametrize("new", [(11, 17), (3, 2), (1, 13), (13, 1), (5, 11)], ids=str)
def test_two_axes_are_resampled_by_cubic_convolution(new: tuple[int, int]) -> None:
    where = random((5, 7))
    (table,) = where.tables(new, LIKE)
    rows, columns = (cubic_convolution(n, m) for n, m in zip((5, 7), new, strict=True))
    expected = np.einsum("ri,cj,ijp->rcp", rows, columns, where.vectors.detach().numpy())
    torch.testing.assert_close(table.detach(), torch.from_numpy(expected), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("grid", [(5,), (5, 7), (3, 5, 2)], ids=str)
def test_shared_points_keep_their_vectors(grid: tuple[int, ...]) -> None:
    """At twice the resolution, every second point coincides with a stored one."""
    where = random(grid)
    (table,) = where.tables([2 * n - 1 for n in grid], LIKE)
    every_second = table[tuple(slice(None, None, 2) for _ in grid)]
    torch.testing.assert_close(every_second, where.vectors, rtol=0.0, atol=1e-12)


def test_axes_are_not_swapped() -> None:
    """Values that vary only along the rows still do so at a non-square size."""
    rows = torch.arange(5.0, dtype=torch.float64)[:, None, None].expand(5, 7, 2)
    (table,) = holding((5, 7), rows).tables((11, 3), LIKE)
    assert table.shape == (11, 3, 2)
    torch.testing.assert_close(table, table[:, :1].expand_as(table), rtol=0.0, atol=1e-12)
    assert (table[1:, 0, 0] > table[:-1, 0, 0]).all()


@pytest.mark.parametrize("new", [(5, 7), (11, 17)], ids=str)
def test_gradients_reach_the_vectors(new: tuple[int, int]) -> None:
    where = random((5, 7))
    (table,) = where.tables(new, LIKE)
    table.square().sum().backward()
    assert where.vectors.grad is not None and where.vectors.grad.abs().amin(-1).count_nonzero() == 35


def test_the_table_takes_the_dtype_of_the_content() -> None:
    where = LearnedGrid((5, 7), 3)
    for grid in ((5, 7), (3, 11)):
        (half,), (full,) = where.tables(grid, LIKE.bfloat16()), where.tables(grid, LIKE.float())
        assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


def test_new_vectors_are_truncated_normal_of_std_0_02() -> None:
    torch.manual_seed(0)
    vectors = LearnedGrid((53, 59), 7).vectors
    assert vectors.abs().max() <= 0.04
    assert abs(vectors.std().item() / 0.0176 - 1) < 0.02


@pytest.mark.refusal
@pytest.mark.parametrize("grid", [(), (2, 3, 5, 7)], ids=str)
def test_grids_of_zero_or_four_axes_raise(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"grid must have one to three axes; got \("):
        LearnedGrid(grid, dim=3)


@pytest.mark.refusal
def test_empty_grids_and_widths_raise() -> None:
    with pytest.raises(ValueError, match=r"grid must have 2 axes of at least one token; got \(5, 0\)"):
        LearnedGrid((5, 0), dim=3)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        LearnedGrid((5, 7), dim=0)


class TestLearnedEmbedding:
    def test_shorter_inputs_use_the_first_vectors(self) -> None:
        where = LearnedEmbedding(7, dim=3).double()
        for size in (1, 5, 7):
            (table,) = where.tables((size,), LIKE)
            assert torch.equal(table, where.vectors[:size])
        assert (where.num_axes, where.dim, table.dtype) == (1, 3, torch.float64)

    def test_indices_without_a_vector_raise(self) -> None:
        where = LearnedEmbedding(7, dim=3)
        assert where(torch.tensor([[6, 0]])).shape == (1, 2, 3)
        for wrong in (7, -1):
            with pytest.raises(ValueError, match=rf"positions must lie in 0 \.\.\. 6; got {wrong}"):
                where(torch.tensor([[3, wrong]]))

    @pytest.mark.refusal
    def test_invalid_lengths_and_grids_raise(self) -> None:
        with pytest.raises(
            ValueError, match=r"grid must have at most length=7 tokens; got 11\. Build LearnedEmbedding with"
        ):
            LearnedEmbedding(7, dim=3).tables((11,), LIKE)
        with pytest.raises(ValueError, match="length must be a whole number of at least 1; got 0"):
            LearnedEmbedding(0, dim=3)
        with pytest.raises(ValueError, match="grid must have"):
            LearnedEmbedding(7, dim=3).tables((3, 5), LIKE)


KINDS = {
    "line": (lambda: Fourier(num_axes=1, num_bands=2, max_resolution=7), (7,)),
    "picture": (lambda: Fourier(num_axes=2, num_bands=3, max_resolution=(5, 7)), (5, 7)),
    "film": (lambda: Fourier(num_axes=3, num_bands=2, max_resolution=7), (2, 3, 5)),
    "one point": (lambda: Fourier(num_axes=2, num_bands=2, max_resolution=7), (1, 1)),
    "learned": (lambda: LearnedGrid((5, 7), dim=3), (5, 7)),
    "resampled": (lambda: LearnedGrid((5, 7), dim=3), (2, 11)),
}


@pytest.mark.parametrize("make, grid", KINDS.values(), ids=KINDS)
def test_it_equals_a_linear_layer_over_the_features(make, grid):
    torch.manual_seed(0)
    where = Projected(make(), dim=11).double()
    torch.nn.init.normal_(where.project.bias)
    like = torch.zeros((), dtype=torch.float64)
    tables = where.tables(grid, like)
    inner = where.positions.tables(grid, like)
    assert len(tables) == len(inner) and (where.dim, where.num_axes) == (11, len(grid))
    expected = F.linear(sum(inner[1:], inner[0]), where.project.weight, where.project.bias)
    torch.testing.assert_close(sum(tables[1:], tables[0]), expected)


def test_gradients_reach_the_layer_and_its_positions():
    where = Projected(LearnedGrid((5, 7), dim=3), dim=11)
    sum(table.square().sum() for table in where.tables((5, 7), torch.zeros(()))).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in where.parameters())


def test_half_precision_is_kept():
    where = Projected(Fourier(num_axes=1, num_bands=2, max_resolution=7), dim=3)
    (table,) = where.tables((7,), torch.zeros((), dtype=torch.bfloat16))
    assert table.dtype == torch.bfloat16


def test_a_model_with_them_is_saved_and_loaded(tmp_path):
    adapter = pc.adapters.Image(3, positions=Projected(LearnedGrid((5, 7), dim=3), dim=11))
    again, pictures = pc.load(pc.save(adapter, tmp_path)), torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(again(pictures).materialize(), adapter(pictures).materialize())


@pytest.mark.refusal
def test_invalid_positions_raise():
    with pytest.raises(
        TypeError, match=r"positions must be an object with dim, num_axes and tables.*; got a built Identity"
    ):
        Projected(torch.nn.Identity(), dim=3)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        Projected(LearnedGrid((5,), dim=3), dim=0)


def test_indices_without_values_give_vectors_without_values() -> None:
    embedding = LearnedEmbedding(7, dim=4)
    assert embedding(torch.arange(3, device="meta")).is_meta
    assert embedding.tables((3,), like=torch.rand(1, device="meta"))[0].is_meta
