"""Projected positions: the sum of projected tables is the projected sum."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.positions import Fourier, LearnedGrid, Projected

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
    with pytest.raises(TypeError, match="positions must have dim, num_axes and tables, as Fourier has; got Identity"):
        Projected(torch.nn.Identity(), dim=3)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        Projected(LearnedGrid((5,), dim=3), dim=0)
