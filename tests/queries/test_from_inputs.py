"""Queries that are the input tokens."""

from __future__ import annotations

import torch

from perceiver_core import Tokens
from perceiver_core.queries import FromInputs
from tests.queries.cases import EXACT, drawn, fourier


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
