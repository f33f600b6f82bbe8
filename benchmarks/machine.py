"""The machine: what it is, and the rates that it reaches at the simplest things, to hold everything else against."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing


def description(device: str) -> dict[str, Any]:
    """What a reader of a figure needs to know of the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def ceilings(device: str, *, toy: bool) -> dict[str, float]:
    """The median of several calls each, in units of 10^9 a second.

    A product of two large matrices in float32 and in bfloat16 (FLOP), a copy of an array far larger than any
    cache (bytes read and written), and exp of an array that fits into the caches (exponentials).
    """
    side = 256 if toy else 2048 if device == "cpu" else 8192
    large = 2**20 if toy else 2**26
    # As much as keeps all threads of the CPU busy with a quarter of a megabyte each.
    cached = 2**16 * torch.get_num_threads() if device == "cpu" else 2**22
    source, target = (torch.ones(large, device=device) for _ in range(2))
    x = torch.randn(cached, device=device)
    out = torch.empty_like(x)
    return {
        "float32 GFLOP/s": _rate(_product(side, torch.float32, device), 2 * side**3, device),
        "bfloat16 GFLOP/s": _rate(_product(side, torch.bfloat16, device), 2 * side**3, device),
        "copy GB/s": _rate(partial(target.copy_, source), 2 * source.nbytes, device),
        "exp G/s": _rate(partial(torch.exp, x, out=out), cached, device, calls=30),
    }


def _product(side: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return partial(torch.mm, a, b, out=out)


def _rate(call: Callable[[], object], units: float, device: str, calls: int = 5) -> float:
    call()
    return units / timing.summary([timing.once(call, device) for _ in range(calls)]).median / 1e9


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
