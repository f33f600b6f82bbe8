"""Grid axes of reads: merged where a table spans several, with one summed table each."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import Tokens
from perceiver_core.reads import merged_axes
from perceiver_core.reads.axes import axis_tables
from tests.reads.factored_cases import GRID, TABLES, B, C, P, draw


def test_axes_spanned_by_a_table_are_merged() -> None:
    actual = {name: merged_axes(Tokens(draw(B, *GRID, C), tables)) for name, tables in TABLES.items()}
    assert actual == {
        **dict.fromkeys(TABLES, GRID),
        "whole grid": (255,),
        "first two axes": (51, 5),
        "last two axes": (3, 85),
        "outer axes": (255,),
        "overlapping spans": (255,),
    }


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_tables_of_the_axes_sum_to_the_positions(tables: tuple[torch.Tensor, ...]) -> None:
    tokens = Tokens(draw(B, *GRID, C), tables)
    axes, own = axis_tables(tokens, torch.float64)
    assert axes == merged_axes(tokens)
    if not tables:
        assert own == ()
        return
    assert [tuple(table.shape) for table in own] == [(size, P) for size in axes]
    total = torch.zeros(*axes, P, dtype=torch.float64)
    for axis, table in enumerate(own):
        total = total + table.reshape(*[-1 if i == axis else 1 for i in range(len(axes))], P)
    torch.testing.assert_close(total.reshape(-1, P), tokens.positions().reshape(-1, P), rtol=0.0, atol=1e-12)


def test_tables_in_another_dtype() -> None:
    _, own = axis_tables(Tokens(draw(B, *GRID, C), TABLES["disjoint"]), torch.float32)
    assert {table.dtype for table in own} == {torch.float32}
