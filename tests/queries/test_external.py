"""Queries that are passed with each call: vectors, in a model too, and points."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc
from perceiver_core.queries import Coordinates, Grid
from tests.queries.cases import EXACT, drawn, fourier


def test_queries_are_passed_through():
    queried = torch.randn(2, 5, 7)
    assert pc.queries.External(7)(queries=queried) is queried
    torch.testing.assert_close(pc.queries.External(7)(queries=queried[0]), queried[:1])


def test_a_model_accepts_external_queries():
    grid = pc.adapters.Grid(3, positions=None)
    encoder = pc.Encoder(3, num_latents=5, dim=11, depth=1, num_heads=1)
    model = pc.PerceiverIO(grid, encoder, pc.queries.External(7), pc.Decoder(11, query_dim=7, out_dim=2))
    data, queried = torch.randn(2, 13, 3), torch.randn(17, 7)
    torch.testing.assert_close(model(data, query_inputs=queried), model(data, query_inputs=queried.expand(2, -1, -1)))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("at", "kind", "message"),
    [
        (None, ValueError, "queries must be q 7 or b q 7; got None"),
        (torch.zeros(5, 6), ValueError, r"queries must be q 7 or b q 7; got shape \(5, 6\)"),
        (torch.zeros(7), ValueError, r"got shape \(7,\)"),
        (torch.zeros(5, 7).long(), TypeError, "queries must be floating point"),
    ],
)
def test_invalid_queries_raise(at, kind, message):
    with pytest.raises(kind, match=message):
        pc.queries.External(7)(queries=at)


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
