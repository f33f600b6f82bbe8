"""Learned positions: exact at their own size, resampled with aligned ends at other sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perceiver_core.positions import LearnedGrid, grid_points

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
