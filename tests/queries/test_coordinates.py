"""Queries at any points."""

from __future__ import annotations

import torch

import perceiver_core as pc
from perceiver_core.queries import Coordinates, Grid
from tests.queries.cases import EXACT, drawn, fourier


class TestCoordinates:
    def test_features_of_any_points(self):
        source, points = Coordinates(fourier(2)), drawn(3, 7, 2).clamp(-1, 1)
        assert source.dim == fourier(2).dim
        torch.testing.assert_close(source(points=points), fourier(2)(points), **EXACT)
        torch.testing.assert_close(source(points=points[0]), fourier(2)(points[:1]), **EXACT)

    def test_the_points_of_a_grid_give_the_queries_of_the_grid(self):
        points = pc.positions.grid_points((5, 7), torch.zeros(())).flatten(0, 1)
        torch.testing.assert_close(
            Coordinates(fourier(2))(points=points), Grid((5, 7), fourier(2))(), rtol=0, atol=1e-6
        )

    def test_gradients_reach_the_points(self):
        points = drawn(1, 3, 1).double().clamp(-0.9, 0.9).requires_grad_()
        assert torch.autograd.gradcheck(lambda at: Coordinates(fourier(1))(points=at), points)
