"""The C++ backend against the reference, where the grid is read in splits that are merged."""

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
    assert cpp._num_splits(2, inputs, 2 + sum(grid)) > 2
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
