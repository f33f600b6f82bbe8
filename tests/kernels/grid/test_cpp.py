"""The C++ backend against the reference: splits that are merged, windows of the grid, and phases of the queries."""

from __future__ import annotations

import warnings

import pytest
import torch

from perceiver_core.kernels.grid import cpp, cpp_library, eager
from perceiver_core.kernels.grid.interface import GridInputs, Upstream


@pytest.fixture(autouse=True)
def compiled() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not cpp_library.functions():
            pytest.skip("no compiler")


@pytest.mark.parametrize("shift", [0.0, -3000.0, 3000.0])
def test_a_few_queries_read_splits_that_are_merged(shift: float) -> None:
    """Some splits have no token, a query of one sample has none at all, and scores are far from zero."""
    generator = torch.Generator().manual_seed(0)
    grid = (41, 67)
    shapes = (2, 1, 3, 2), (2, 1, 3, sum(grid)), (2, 2, *grid), (2, *grid)
    content_queries, axis_queries, content, scale = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.rand(2, *grid, generator=generator) < 0.7
    mask[0, :20], mask[1] = False, False
    mask[1, -1, -1] = shift == 0.0
    inputs = GridInputs(content_queries, axis_queries + shift, content, scale.abs() * 0.1 + 0.5, mask)

    actual, expected = cpp.forward(inputs), eager.forward(inputs)
    log_sums = [(outputs.base + outputs.total.log2()).double() for outputs in (actual, expected)]
    torch.testing.assert_close(log_sums[0], log_sums[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0.0, atol=2e-5 if shift == 0.0 else 2e-3)
    assert torch.isfinite(torch.stack([x.sum() for x in actual])).all()


@pytest.mark.parametrize("grid", [(3001,), (1, 3001), (41, 67), (9, 11, 31)], ids=str)
@pytest.mark.parametrize("query_batch", [1, 2], ids=["shared", "separate"])
@pytest.mark.parametrize("needs_token_gradients", [True, False], ids=["tokens", "queries"])
def test_gradients_of_splits_are_summed(grid: tuple[int, ...], query_batch: int, needs_token_gradients: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    leading = (query_batch, 3, 17)
    shapes = (*leading, 3), (*leading, sum(grid)), (2, 3, *grid), (2, *grid)
    tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
    inputs = GridInputs(*tensors, torch.rand(2, *grid, generator=generator) < 0.7)
    outputs = eager.forward(inputs)
    d_read, d_marginals = (torch.randn(2, 3, 17, n, generator=generator).double() for n in (3, sum(grid)))
    offset = torch.randn(2, 3, 17, generator=generator).double()
    upstream = Upstream(outputs.base, outputs.total, d_read, d_marginals, offset)
    actual, expected = (tuple(backend.backward(inputs, upstream, needs_token_gradients)) for backend in (cpp, eager))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# Windows have up to 256 rows and 1024 columns. Where copies of the gradients of queries that are shared by many samples
# exceed the memory for them, the queries are processed in phases, or several samples in turn.
LARGE = {
    "rows": {"grid": (1201, 3)},
    "columns": {"grid": (3, 2503)},
    "rows and columns": {"grid": (271, 1301)},
    "one axis": {"grid": (5003,), "batch": 2, "channels": 3},
    "many channels": {"grid": (3, 1153), "channels": 131},
    "rows of three axes": {"grid": (23, 29, 5), "queries": 37, "heads": 2},
    "a last axis of one": {"grid": (601, 1)},
    "first axes of one": {"grid": (1, 1, 3001), "batch": 2},
    "phases": {"grid": (1, 2503), "queries": 67, "batch": 25},
    "slots": {"grid": (1, 3001), "queries": 3, "batch": 103},
    "slots of one axis": {"grid": (5003,), "queries": 3, "batch": 67},
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("query_batch", [1, None], ids=["shared", "separate"])
def test_large_grids_equal_the_reference_with_any_number_of_threads(case: str, query_batch: int | None) -> None:
    sizes = {"batch": 1, "heads": 1, "queries": 3, "channels": 2, **LARGE[case]}
    grid, batch = sizes["grid"], sizes["batch"]
    generator = torch.Generator().manual_seed(0)
    leading = (query_batch or batch, sizes["heads"], sizes["queries"])
    shapes = (*leading, sizes["channels"]), (*leading, sum(grid)), (batch, sizes["channels"], *grid), (batch, *grid)
    tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
    tensors[1][..., -1] += 90.0  # the largest score by far comes last, so that earlier sums are rescaled
    inputs = GridInputs(*tensors, torch.rand(batch, *grid, generator=generator) < 0.9)
    outputs = eager.forward(inputs)
    upstream = Upstream(outputs.base, outputs.total, *outputs[:2], torch.randn_like(outputs.total))
    expected = (*outputs[:2], outputs.base + outputs.total.log2(), *eager.backward(inputs, upstream, True))
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        converted = (
            GridInputs(*(x.to(dtype) for x in inputs[:4]), inputs.mask),
            Upstream(*(x.to(dtype) for x in upstream)),
        )
        actual = [with_threads(threads, *converted) for threads in (1, 3)]
        for other in actual[1:]:
            torch.testing.assert_close(other, actual[0], rtol=0.0, atol=0.0)
        for a, e in zip(actual[0], expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=0.0, atol=tolerance * e.abs().max().item())


def with_threads(threads: int, inputs: GridInputs, upstream: Upstream) -> tuple[torch.Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = cpp.forward(inputs)
        return *outputs[:2], outputs.base + outputs.total.log2(), *cpp.backward(inputs, upstream, True)
    finally:
        torch.set_num_threads(before)
