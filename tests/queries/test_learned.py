"""Learned queries."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import queries
from tests.queries.cases import check_some


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
