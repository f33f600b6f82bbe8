"""Learned vectors by index."""

from __future__ import annotations

import pytest
import torch

from perceiver_core.positions import LearnedEmbedding

LIKE = torch.zeros((), dtype=torch.float64)


class TestLearnedEmbedding:
    def test_shorter_inputs_use_the_first_vectors(self) -> None:
        where = LearnedEmbedding(7, dim=3).double()
        for size in (1, 5, 7):
            (table,) = where.tables((size,), LIKE)
            assert torch.equal(table, where.vectors[:size])
        assert (where.num_axes, where.dim, table.dtype) == (1, 3, torch.float64)

    def test_indices_without_a_vector_raise(self) -> None:
        where = LearnedEmbedding(7, dim=3)
        assert where(torch.tensor([[6, 0]])).shape == (1, 2, 3)
        for wrong in (7, -1):
            with pytest.raises(ValueError, match=rf"positions must lie in 0 \.\.\. 6; got {wrong}"):
                where(torch.tensor([[3, wrong]]))

    @pytest.mark.refusal
    def test_invalid_lengths_and_grids_raise(self) -> None:
        with pytest.raises(
            ValueError, match=r"grid must have at most length=7 tokens; got 11\. Build LearnedEmbedding with"
        ):
            LearnedEmbedding(7, dim=3).tables((11,), LIKE)
        with pytest.raises(ValueError, match="length must be a whole number of at least 1; got 0"):
            LearnedEmbedding(0, dim=3)
        with pytest.raises(ValueError, match="grid must have"):
            LearnedEmbedding(7, dim=3).tables((3, 5), LIKE)
