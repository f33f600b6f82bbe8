"""The peak memory of one call.

On the CPU: the highest resident memory of a fresh process during the call, less the resident memory just before
it. So it counts all that the call holds at once beyond weights and inputs, its results included: activations,
gradients, working memory of the kernels, and what the allocator keeps between them. A first call also loads code
and starts threads, so one that took less than 5 s is made again and the second counts. Linux lets a process reset
its highest resident memory; elsewhere it is the growth of the process's lifelong peak in the first call, which is
too little where the setup had used more than it kept.

On CUDA: the highest memory of tensors during a warm call, less that before it, without what the allocator reserves;
and the largest single allocation, which tells whether a tensor of latents times inputs was ever there.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import child

PROCESS = Path("/proc/self")


def peak(setup: Callable[[str], Any], call: Callable[[Any], object]) -> float:
    """The bytes that `call(setup("cpu"))` needs beyond what the setup holds, in a process of its own."""
    return child.run(_on_cpu, setup, call, torch.get_num_threads())


def peak_on_cuda(call: Callable[[], object]) -> float:
    """The bytes that a call needs beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def largest_allocation(call: Callable[[], object]) -> float | None:
    """The bytes of the largest piece of memory that a call asks for on CUDA; None where PyTorch cannot tell.

    PyTorch's history of allocations is not a public interface, so it may be missing.
    """
    try:
        torch.cuda.memory._record_memory_history("all", context=None, clear_history=True)
    except (AttributeError, RuntimeError, TypeError):
        return None
    try:
        call()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(None)
    return largest(traces)


def largest(traces: list[list[dict[str, Any]]]) -> float:
    """The largest allocation in the history of each device."""
    return float(max((entry["size"] for trace in traces for entry in trace if entry["action"] == "alloc"), default=0))


def _on_cpu(setup: Callable[[str], Any], call: Callable[[Any], object], threads: int) -> float:
    torch.set_num_threads(threads)
    state = setup("cpu")
    began = time.perf_counter()
    needed = _growth(call, state)
    if (PROCESS / "clear_refs").exists() and time.perf_counter() - began < 5:
        needed = _growth(call, state)
    return needed


def _growth(call: Callable[[Any], object], state: Any) -> float:
    gc.collect()
    _trim()
    _reset()
    before = _field("VmRSS")
    result = call(state)
    needed = _field("VmHWM") - before
    del result
    return needed


def _trim() -> None:
    """Gives freed memory back to the system, or the call would take it from there unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset() -> None:
    """Sets the process's highest resident memory to the present one, where the system can."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def _field(name: str) -> float:
    """A line of Linux's account of this process, in bytes; without one, the lifelong peak."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return 1024.0 * int(found[1])
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
