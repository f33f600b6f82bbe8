"""All query modules: errors and saving."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import Tokens, queries
from perceiver_core.positions import LearnedEmbedding, LearnedGrid
from perceiver_core.queries import Coordinates, FromInputs, Grid, Multimodal
from tests.queries.cases import EXACT, drawn, fourier

AT = torch.tensor([0])
REFUSED = {
    "too far": (
        queries.Learned(3, 2),
        torch.tensor([0, 3]),
        ValueError,
        r"query_indices must lie in 0 \.\.\. 2; got 3",
    ),
    "negative": (queries.Learned(3, 2), torch.tensor([-1]), ValueError, "got -1"),
    "fractions": (
        queries.Learned(3, 2),
        torch.tensor([0.5]),
        TypeError,
        "query_indices must be indices, an integer tensor",
    ),
    "a mask": (queries.Learned(3, 2), torch.ones(3).bool(), TypeError, "query_indices must be indices"),
    "a list": (queries.Learned(3, 2), [0, 1], TypeError, "got list"),
    "none": (
        queries.Learned(3, 2),
        torch.zeros(0).long(),
        ValueError,
        "query_indices must be q or b q indices, one at least",
    ),
    "a scalar": (queries.Learned(3, 2), torch.tensor(1), ValueError, "query_indices must be q or b q"),
    "off the grid": (Grid((5, 7), fourier(2)), torch.tensor([35]), ValueError, r"0 \.\.\. 34; got 35"),
    "left of the grid": (Grid((5, 7), fourier(2), endpoint=False), torch.tensor([35]), ValueError, r"0 \.\.\. 34"),
    "no grid": (Grid(None, fourier(2)), AT, ValueError, "tokens must be Tokens, whose grid is used"),
    "no points": (Coordinates(fourier(2)), None, ValueError, "points must be q 2 or b q 2; got None"),
    "points of three": (Coordinates(fourier(2)), torch.zeros(5, 3), ValueError, "points must be q 2 or b q 2"),
    "whole points": (Coordinates(fourier(2)), torch.zeros(5, 2).long(), TypeError, "points must be floating point"),
    "no dictionary": (Multimodal({"a": queries.Learned(3, 2)}), AT, TypeError, r"by modality, of \['a'\]; got Tensor"),
    "an empty tensor": (
        Multimodal({"a": queries.Learned(3, 2)}),
        AT[:0],
        TypeError,
        "query_indices must be a dictionary by modality",
    ),
    "far in a kind": (
        Multimodal({"a": queries.Learned(3, 2)}),
        {"a": AT + 3},
        ValueError,
        r"queries\['a'\]: query_indices must",
    ),
    "another kind": (Multimodal({"a": queries.Learned(3, 2)}), {"b": AT}, ValueError, r"query_indices names \['b'\]"),
}


@pytest.mark.refusal
@pytest.mark.parametrize("source, at, kind, message", REFUSED.values(), ids=REFUSED)
def test_invalid_query_inputs_raise(source, at, kind, message):
    with pytest.raises(kind, match=message):
        source(None, at)


@pytest.mark.refusal
def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="grid must have 2 axes of at least one token"):
        Grid((5,), fourier(2))
    with pytest.raises(
        TypeError, match=r"positions must (be positions with|have) dim and num_axes (that|and) take points"
    ):
        Coordinates(nn.Identity())
    with pytest.raises(TypeError, match=r"take points, as .*; got LearnedGrid"):
        Coordinates(LearnedGrid((5,), 3))
    with pytest.raises(TypeError, match=r"take points, as .*; got LearnedEmbedding"):
        Coordinates(LearnedEmbedding(5, 3))
    with pytest.raises(ValueError, match="num_queries must be a whole number of at least 1; got 0"):
        queries.Learned(0, 3)
    with pytest.raises(ValueError, match="tokens must have 3 features"):
        FromInputs(3)(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="sources must hold a source of queries at least"):
        Multimodal({})
    with pytest.raises(
        TypeError, match=r"positions must (be positions with|have) dim and num_axes (that|and) take points"
    ):
        Grid((5,), LearnedGrid((5,), 3), endpoint=False)


@pytest.mark.parametrize(
    "source",
    [
        queries.Learned(3, 2),
        Grid((5, 7), LearnedGrid((5, 7), 3)),
        Grid(None, fourier(2), endpoint=False),
        Coordinates(fourier(2)),
        FromInputs(3),
        Multimodal({"a": queries.Learned(3, 2), "b": Grid((5, 7), fourier(2))}, min_modality_channels=3),
    ],
    ids=lambda source: type(source).__name__,
)
def test_queries_are_saved_and_loaded(source, tmp_path):
    again, tokens = pc.load(pc.save(source, tmp_path)), Tokens(drawn(2, 5, 7, 3))
    at = torch.zeros(1, 4, 2) if isinstance(source, Coordinates) else None
    torch.testing.assert_close(again(tokens, at), source(tokens, at), **EXACT)
