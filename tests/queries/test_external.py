"""External queries: passed through, with a batch axis, in a model."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc


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
