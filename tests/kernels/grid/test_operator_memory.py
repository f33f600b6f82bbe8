"""Memory of `read_grid`: nothing of queries x tokens is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from perceiver_core.kernels.grid import eager
from perceiver_core.kernels.grid.interface import GridInputs, Upstream
from tests.kernels.grid.cases import formula, random_inputs, random_mask
from tests.memory import Largest


@pytest.mark.parametrize("query_batch", [1, 2], ids=["shared", "separate"])
def test_nothing_of_queries_times_tokens_is_made(query_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PyTorch the largest tensor is that of the marginals, a gradient of the content, or a slab's scores."""
    inputs = GridInputs(*random_inputs(101, 11, query_batch=query_batch, queries=53), random_mask(2, 101, 11))
    weights, marginals, gradient = 2 * 53 * 101 * 11, 2 * 53 * (101 + 11), 2 * 3 * 101 * 11
    monkeypatch.setattr(eager, "MAX_SCORES", 53 * 11)
    with Largest() as largest:
        outputs = eager.forward(inputs)
        upstream = Upstream(outputs.base, outputs.total, outputs.content, outputs.marginals, outputs.total)
        eager.backward(inputs, upstream, True)
    assert largest.size <= max(marginals, gradient) < weights / 9
    with Largest() as largest:
        formula(*inputs)
    assert largest.size >= weights  # the measure does see them


READ_AND_REPORT = """
import re, sys, torch
from pathlib import Path
from perceiver_core.kernels.grid import cpp_library, read_grid

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def read(*grid):
    content = torch.randn(1, 1, *grid, requires_grad=True)
    content_queries = torch.randn(1, 1, 64, 1, requires_grad=True)
    axis_queries = torch.randn(1, 1, 64, sum(grid), requires_grad=True)
    out = read_grid(content_queries, axis_queries, content, torch.ones(1, *grid, requires_grad=True))
    (out.content.sum() + out.marginals.square().sum() + out.lse.sum()).backward()
    assert content.grad.isfinite().all()

read(11, 13)
before = peak()
read(1741, 1747)
print(bool(cpp_library.functions()), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_the_cpp_loop_needs_little_more_than_the_tokens_and_their_gradients() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_AND_REPORT], capture_output=True, text=True, check=True
    )
    compiled, needed = run.stdout.split()
    if compiled != "True":
        pytest.skip("no compiler")
    tokens = 1741 * 1747
    assert 4 * 4 * tokens < int(needed) < 64 * tokens * 4 / 4  # the weights would take four times as much
