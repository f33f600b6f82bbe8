"""Measurement of the working memory of compiled reads: peak resident memory minus inputs and outputs.

    MALLOC_MMAP_THRESHOLD_=16384 python -m tests.robustness.working_memory <number of tokens>

Prints one line for each grid and pass: its name, and the bytes of working memory. Each grid has this number of tokens.
The variable makes glibc return memory that is freed, so that outputs do not reuse memory that was counted before.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from perceiver_core.kernels.grid import cpp, cpp_library
from perceiver_core.kernels.grid.interface import GridInputs, Upstream
from perceiver_core.kernels.grid.operator import read_grid


def main(num_tokens: int) -> None:
    side, edge = round(num_tokens ** (1 / 2)), round(num_tokens ** (1 / 3))
    tall, wide = (num_tokens // 2, 2), (2, num_tokens // 2)
    sizes = {  # grid, batch, heads, queries, channels
        "one axis": ((num_tokens,), 1, 1, 3, 1),
        "one row": ((1, num_tokens), 1, 1, 3, 1),
        "one column": ((num_tokens, 1), 1, 1, 3, 1),
        "two rows": (wide, 1, 1, 2, 1),
        "two columns": (tall, 1, 1, 2, 1),
        "square": ((side, side), 1, 2, 19, 2),
        "cube": ((edge, edge, edge), 1, 2, 19, 2),
        "row of a cube": ((1, 1, num_tokens), 1, 1, 2, 1),
        "column of a cube": ((num_tokens, 1, 1), 1, 1, 2, 1),
        "batch": ((num_tokens // 16, 4), 4, 1, 2, 1),
        "batch of one axis": ((num_tokens // 8,), 8, 1, 2, 1),
        "batch of images": ((side // 16, side // 16), 256, 2, 19, 2),
    }
    assert cpp_library.functions()
    for name, (grid, batch, heads, queries, channels) in sizes.items():
        leading = 1, heads, queries
        shapes = (*leading, channels), (*leading, sum(grid)), (batch, channels, *grid), (batch, *grid)
        inputs = GridInputs._make([*(torch.zeros(shape).normal_() for shape in shapes), None])
        print(f"{name}, forward: {measure(lambda: cpp.forward(inputs))}", flush=True)  # noqa: B023
        outputs = cpp.forward(inputs)
        upstream = Upstream(outputs.base, outputs.total, outputs.content, outputs.marginals, outputs.base)
        print(f"{name}, backward: {measure(lambda: cpp.backward(inputs, upstream, True))}", flush=True)  # noqa: B023
        leaves = [x.requires_grad_() for x in inputs[:4]]
        read = read_grid(*leaves)
        d_read = [x.detach().clone() for x in read]
        print(f"{name}, autograd: {measure(lambda: torch.autograd.grad(read, leaves, d_read))}", flush=True)  # noqa: B023


def measure(function: Callable[[], Iterable[Tensor]]) -> int:
    """Return the peak of the resident memory during a call, minus what it was before and the sizes of the outputs."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    outputs = function()
    return status("VmHWM") - before - sum(x.untyped_storage().nbytes() for x in outputs)


def status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


if __name__ == "__main__":
    main(int(sys.argv[1]))
