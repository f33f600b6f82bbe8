"""Grids of any number of axes."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import positions
from perceiver_core.adapters import Grid


@pytest.mark.parametrize("grid", [(11,), (3, 7), (2, 3, 5), (2, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_point_is_a_token(grid, channels):
    where = positions.Fourier(num_axes=len(grid), num_bands=3, max_resolution=7)
    adapter = Grid(channels, positions=where)
    x = torch.randn(2, *grid, channels)
    dense = adapter(x).materialize()
    assert adapter(x).grid == grid
    assert dense.shape[-1] == adapter.dim
    torch.testing.assert_close(dense[..., :channels], x.flatten(1, -2), rtol=0, atol=0)
    expected = where(positions.grid_points(grid, like=x)).flatten(0, -2)
    torch.testing.assert_close(dense[0, :, channels:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(11,), (3, 7), (2, 3, 5)], ids=str)
def test_without_positions_a_grid_has_any_number_of_axes(grid):
    x = torch.randn(2, *grid, 3)
    torch.testing.assert_close(Grid(3, positions=None)(x).materialize(), x.flatten(1, -2), rtol=0, atol=0)


def test_a_mask_over_the_grid():
    x = torch.randn(2, 3, 5, 7)
    mask = torch.rand(2, 3, 5) < 0.6
    mask[:, 0] = True
    tokens = Grid(7, positions=None)(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
    torch.testing.assert_close(tokens.materialize(), (x * mask[..., None]).flatten(1, 2), rtol=0, atol=0)


@pytest.mark.refusal
def test_invalid_arrays_raise():
    with pytest.raises(ValueError, match=r"x must be b \*grid c with 2 grid axes; got shape \(2, 5, 7\)"):
        Grid(7, positions=positions.NeRF(num_axes=2))(torch.rand(2, 5, 7))
    with pytest.raises(ValueError, match=r"x must be b \*grid c with 1 grid axes; got shape \(2, 7\)"):
        Grid(7, positions=None)(torch.rand(2, 7))
    with pytest.raises(ValueError, match="x must have 7 channels in axis 2; got 3"):
        Grid(7, positions=None)(torch.rand(2, 5, 3))
