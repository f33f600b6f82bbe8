"""Learned queries, and queries that are the input tokens."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import Tokens, queries
from perceiver_core.queries import FromInputs
from tests.queries.cases import EXACT, check_some, drawn, fourier


class TestLearned:
    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_queries_are_the_learned_vectors(self, count):
        source = queries.Learned(count, dim=5)
        assert torch.equal(source()[0], source.vectors) and source().shape == (1, count, 5)
        check_some(source, None, count)

    def test_gradients_reach_the_selected_queries(self):
        source = queries.Learned(7, dim=5)
        source(query_indices=torch.tensor([[1, 1], [1, 4]])).sum().backward()
        assert source.vectors.grad[:, 0].tolist() == [0, 3, 0, 0, 1, 0, 0]


class TestFromInputs:
    def test_queries_are_the_dense_tokens(self):
        where = fourier(2)
        tokens = Tokens(drawn(2, 5, 7, 3), position_tables=where.tables((5, 7), torch.zeros(())))
        source = FromInputs(tokens.dim)
        torch.testing.assert_close(source(tokens), tokens.materialize(), **EXACT)
        torch.testing.assert_close(source(tokens.materialize()), tokens.materialize(), **EXACT)
        at = torch.tensor([[34, 0, 3], [1, 1, 2]])
        expected = torch.stack([x[a] for x, a in zip(tokens.materialize(), at, strict=True)])
        torch.testing.assert_close(source(tokens, query_indices=at), expected, **EXACT)
        torch.testing.assert_close(source(tokens, query_indices=at[0]), tokens.materialize()[:, at[0]], **EXACT)
