"""Queries at the positions of a grid."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc
from perceiver_core import Tokens
from perceiver_core.positions import LearnedEmbedding, LearnedGrid, Projected
from perceiver_core.queries import Grid
from tests.queries.cases import EXACT, check_some, drawn, fourier

GRIDS = {
    "line": ((7,), fourier(1)),
    "picture": ((5, 7), fourier(2)),
    "film": ((2, 5, 3), fourier(3)),
    "one point": ((1, 1), fourier(2)),
    "one row": ((1, 7), fourier(2)),
    "learned line": ((7,), LearnedGrid((7,), dim=4)),
    "learned picture": ((5, 7), LearnedGrid((5, 7), dim=4)),
    "learned film, resampled": ((2, 5, 3), LearnedGrid((3, 2, 2), dim=4)),
    "up to": ((7,), LearnedEmbedding(11, dim=4)),
    "projected": ((5, 7), Projected(fourier(2), dim=4)),
}


class TestGrid:
    @pytest.mark.parametrize("grid, where", GRIDS.values(), ids=GRIDS)
    @pytest.mark.parametrize("own", [True, False])
    def test_queries_are_positions_with_the_last_axis_fastest(self, grid, where, own):
        source = Grid(grid if own else None, where)
        tokens = Tokens(drawn(2, *(grid if not own else (2,) * len(grid)), 3))
        like = tokens.content
        expected = Tokens(torch.zeros(1, *grid, 1), position_tables=where.tables(grid, like)).materialize()[..., 1:]
        torch.testing.assert_close(source(tokens), expected, **EXACT)
        check_some(source, tokens, torch.Size(grid).numel())

    @pytest.mark.parametrize("grid", [(7,), (5, 7), (2, 5, 3), (1, 1)])
    def test_without_endpoint_points_are_at_the_left_of_their_cells(self, grid):
        where = fourier(len(grid))
        source, count = Grid(grid, where, endpoint=False), torch.Size(grid).numel()
        at = torch.randint(count, (2, 11), generator=torch.Generator().manual_seed(0))
        indices = torch.stack(torch.unravel_index(at, grid), -1)
        expected = where(2 * indices / torch.tensor(grid) - 1)
        torch.testing.assert_close(source(query_indices=at), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(source(query_indices=at[0]), expected[:1], rtol=0, atol=1e-6)
        torch.testing.assert_close(source(), Grid(grid, where)(), **EXACT)  # all of them together lie on the grid

    def test_queries_take_the_dtype_of_the_tokens(self):
        tokens = Tokens(torch.zeros(1, 5, 3, dtype=torch.float64))
        assert Grid(None, fourier(1))(tokens).dtype == torch.float64
        assert Grid((5,), fourier(1))(tokens, query_indices=torch.tensor([2])).dtype == torch.float64
        assert Grid((5,), fourier(1), endpoint=False)(tokens, query_indices=torch.tensor([2])).dtype == torch.float64

    @pytest.mark.parametrize("endpoint", [True, False])
    def test_queries_take_the_dtype_of_a_plain_tensor_and_of_the_first_of_several_inputs(self, endpoint):
        source, x = Grid((5,), fourier(1), endpoint=endpoint), torch.zeros(1, 5, 3, dtype=torch.float64)
        for tokens in (x, [x, x.float()], [Tokens(x)]):
            for selected in (None, torch.tensor([2])):
                assert source(tokens, query_indices=selected).dtype == torch.float64

    def test_gradients_reach_a_learned_grid(self):
        where = LearnedGrid((5, 7), dim=3)
        Grid((5, 7), where)(query_indices=torch.tensor([[8, 8, 34]])).sum().backward()
        assert where.vectors.grad[..., 0].nonzero().tolist() == [[1, 1], [4, 6]]
        assert where.vectors.grad[1, 1, 0] == 2

    def test_a_short_text_is_queried_at_its_own_positions(self):
        where = LearnedEmbedding(11, dim=3)
        tokens = pc.adapters.TokenEmbedding(13, dim=5)(torch.zeros(2, 4, dtype=torch.long))
        assert torch.equal(Grid(None, where)(tokens)[0], where.vectors[:4])
