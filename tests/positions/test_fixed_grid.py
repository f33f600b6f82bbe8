"""FixedGrid: positions by index for every input size, equal to the wrapped positions at the size of the grid."""

import pytest
import torch

import perceiver_core as pc
from perceiver_core import positions
from perceiver_core.positions import FixedGrid

LIKE = torch.zeros(())


class Custom:
    """Positions of a user, without a parent class."""

    dim, num_axes = 2, 1

    def tables(self, grid, like):
        index = torch.arange(grid[0], dtype=like.dtype) / grid[0]
        return (torch.stack([index, index**2], dim=-1),)


INNER = {
    "fourier": positions.Fourier(2, 3, max_resolution=(5, 9)),
    "per axis": positions.FourierPerAxis(2, 3),
    "nerf": positions.NeRF(2, 3),
    "gaussian": positions.Gaussian(2, 3),
    "learned": positions.LearnedGrid((5, 9), 4),
    "resampled": positions.LearnedGrid((3, 2), 4),
    "projected": positions.Projected(positions.Fourier(2, 3), 4),
}


def total(positions_, grid, like=LIKE):
    tables = positions_.tables(grid, like=like)
    return sum(tables[1:], tables[0])


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("grid", [(5, 9), (1, 1), (4, 9), (5, 2)])
def test_a_corner_of_the_fixed_grid(name, grid):
    fixed = FixedGrid(INNER[name], (5, 9))
    expected = total(INNER[name], (5, 9))[: grid[0], : grid[1]]
    torch.testing.assert_close(total(fixed, grid), expected, rtol=0, atol=0)
    assert fixed.spanned_axes == (False, False)


@pytest.mark.parametrize("name", ["fourier", "per axis", "nerf", "gaussian"])
def test_features_of_coordinates_go_on_beyond_the_grid(name):
    inner = INNER[name]
    x, y = torch.arange(7.0) * 2 / 4 - 1, torch.arange(12.0) * 2 / 8 - 1
    expected = inner(torch.cartesian_prod(x, y)).reshape(7, 12, -1)
    torch.testing.assert_close(total(FixedGrid(inner, (5, 9)), (7, 12)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["learned", "projected"])
def test_other_positions_end_with_the_grid(name):
    with pytest.raises(ValueError, match=r"grid must be at most \(5, 9\), the grid of FixedGrid; got \(6, 9\)"):
        FixedGrid(INNER[name], (5, 9)).tables((6, 9), like=LIKE)


@pytest.mark.parametrize("name", ["fourier", "learned"])
def test_an_axis_without_a_fixed_size_is_spanned(name):
    fixed = FixedGrid(INNER[name], (5, None))
    assert fixed.spanned_axes == (False, True)
    torch.testing.assert_close(total(fixed, (3, 7)), total(INNER[name], (5, 7))[:3], rtol=0, atol=0)


def test_positions_of_a_user():
    fixed = FixedGrid(Custom(), (8,))
    assert torch.equal(total(fixed, (3,)), total(Custom(), (8,))[:3])
    assert fixed.spanned_axes == ()


def test_one_token_is_where_it_would_be_in_the_grid():
    fourier = positions.Fourier(1, 3)
    assert torch.equal(total(FixedGrid(fourier, (1,)), (1,)), total(fourier, (1,)))
    assert total(FixedGrid(fourier, (1,)), (3,)).isfinite().all()


def test_cached_tables_of_a_fixed_and_a_spanned_grid_differ():
    fourier = positions.Fourier(1, 3)
    spanned, fixed = total(fourier, (4,)), total(FixedGrid(fourier, (9,)), (4,))
    assert not torch.equal(spanned, fixed)
    assert torch.equal(total(fourier, (4,)), spanned)
    assert torch.equal(total(FixedGrid(fourier, (9,)), (4,)), fixed)


def test_gradients_reach_learned_positions():
    learned = positions.LearnedGrid((5,), 2)
    total(FixedGrid(learned, (5,)), (3,)).sum().backward()
    assert learned.vectors.grad.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2


def test_dtype_and_round_trip(tmp_path):
    fixed = FixedGrid(positions.LearnedGrid((5,), 2), (5,))
    assert total(fixed, (3,), torch.zeros((), dtype=torch.bfloat16)).dtype == torch.bfloat16
    audio = pc.adapters.Audio(4, positions=fixed)
    encoder = pc.Encoder(audio.dim, num_latents=3, dim=16, depth=1, num_heads=2)
    model = pc.Perceiver(audio, encoder, pc.heads.Classification(16, num_classes=5)).eval()
    pc.save(model, tmp_path / "model")
    x = torch.randn(2, 11)
    assert torch.equal(pc.load(tmp_path / "model").eval()(x), model(x))


@pytest.mark.compile
def test_sizes_stay_dynamic_when_compiled():
    audio = pc.adapters.Audio(4, positions=FixedGrid(positions.Fourier(1, 3), (50,)))
    compiled = torch.compile(lambda x: audio(x).materialize(), backend="eager", dynamic=True, fullgraph=True)
    for size in (40, 57, 300):
        x = torch.randn(2, size)
        torch.testing.assert_close(compiled(x), audio(x).materialize())


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("inner", "grid", "error", "message"),
    [
        (positions.Fourier, (5,), TypeError, "positions must be an object with dim, num_axes and tables"),
        (positions.Rotary(), (5,), TypeError, "positions must be an object with dim, num_axes and tables"),
        (positions.Fourier(2), (5,), ValueError, r"grid must have one size for each of 2 axes; got \(5,\)"),
        (
            positions.Fourier(1),
            5,
            TypeError,
            "grid must be a sequence whose items are each a whole number or None; got 5",
        ),
        (positions.Fourier(2), (5, 0), ValueError, r"grid\[1\] must be a whole number of at least 1; got 0"),
        (positions.Fourier(1), (2.5,), ValueError, r"grid\[0\] must be a whole number or None; got 2.5"),
    ],
)
def test_what_is_refused(inner, grid, error, message):
    with pytest.raises(error, match=message):
        FixedGrid(inner, grid)
