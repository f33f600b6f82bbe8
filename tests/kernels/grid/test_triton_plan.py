"""Plans of structured reads on a GPU: padding, number of parts, memory. They need no GPU."""

from __future__ import annotations

import pytest
import torch

from perceiver_core.kernels.grid import triton_plan
from perceiver_core.kernels.grid.interface import GridInputs
from perceiver_core.kernels.grid.triton_launch import QUERY_OPTIONS_MATRIX, QUERY_OPTIONS_REGISTERS
from perceiver_core.kernels.grid.triton_plan import WARPS_PER_PROCESSOR, Plan


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU has 132 multiprocessors."""
    monkeypatch.setattr(triton_plan, "num_processors", lambda device: 132)


def make_plan(batch: int, heads: int, queries: int, channels: int, *grid: int) -> Plan:
    shapes = (batch, heads, queries, channels), (batch, heads, queries, sum(grid)), (batch, channels, *grid)
    return Plan.of(GridInputs(*(torch.empty(shape, device="meta") for shape in (*shapes, (batch, *grid))), None))


@pytest.mark.parametrize("queries", [1, 32, 33, 64, 100, 512])
@pytest.mark.parametrize("channels", [1, 3, 8, 9, 64])
def test_every_size_has_options(queries: int, channels: int) -> None:
    plan = make_plan(2, 3, queries, channels, 5, 7)
    options = QUERY_OPTIONS_REGISTERS if channels <= 8 else QUERY_OPTIONS_MATRIX
    assert any(plan.queries % option["BLOCK"] == 0 for option in options)
    assert plan.queries - 32 < queries <= plan.queries
    assert plan.padded_width % 16 == 0 and plan.padded_width - plan.stretch < plan.width


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 3, 224, 224), (32, 1, 512, 3, 224, 224), (1, 8, 256, 3, 3_000_000), (1, 1, 7, 3, 5)]
)
def test_a_gpu_is_occupied_as_far_as_the_grid_can_be_split(hopper: None, sizes: tuple[int, ...]) -> None:
    plan = make_plan(*sizes)
    warps = plan.batch_heads * plan.queries // 32 * plan.splits * plan.groups
    most = plan.batch_heads * plan.queries // 32 * plan.height * plan.stretches
    assert warps >= min(132 * WARPS_PER_PROCESSOR, most)
    assert 1 <= plan.splits <= plan.height and 1 <= plan.groups <= plan.stretches


def test_parts_take_no_more_memory_for_more_tokens(hopper: None) -> None:
    """Memory grows like the results, with rows and columns times queries."""
    for side in (1000, 10_000, 100_000):
        plan = make_plan(1, 1, 512, 3, side, side)
        parts = plan.groups * plan.height * 2 + plan.splits * plan.padded_width
        assert parts <= 60 * 2 * side


def test_products_of_sizes_fit_into_the_integers_of_the_kernels(hopper: None) -> None:
    for grid in ((2**30, 3), (3, 2**30), (2**31 - 16,), (2**10, 2**20, 2)):
        plan = make_plan(1, 1, 1, 3, *grid)
        assert plan.height * plan.splits < 2**31 and plan.stretches * plan.groups < 2**31
