"""Description of the machine, and the rates that it reaches at simple operations, with which all else is compared."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measurement, report
from perceiver_core.kernels.fastest import has_bfloat16_units

CHAIN = 64  # exponentials of one number in sequence, on CUDA


def description(device: str) -> dict[str, Any]:
    """Return the facts that every figure has to be quoted with: processor, threads, versions."""
    cuda = {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda} if device.startswith("cuda") else {}
    facts = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    versions = {"system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
    return facts | versions | cuda


def reason_to_skip(dtype: str, device: str, *, toy: bool) -> str:
    """Return why a dtype is not measured on a device; empty if it is."""
    if device != "cpu" or dtype != "bfloat16" or toy or has_bfloat16_units():
        return ""
    return f"{_processor()} is not known to have units for bfloat16, and their emulation takes too long"


def ceilings(device: str, *, toy: bool) -> dict[str, float]:
    """Return the medians of several calls each, in units of 10^9 per second.

    They are: a product of two large matrices (FLOP) in float32 (on CUDA by PyTorch's default, without TF32) and in
    bfloat16, unless the processor has to emulate it; a copy of an array far larger than any cache (bytes read and
    written); and exponentials, on the CPU of an array in the caches. On CUDA these are many in sequence on each number
    of a large array, in one kernel of torch.compile, since a single one would wait for memory.
    """
    dtypes = [dtype for dtype in ("float32", "bfloat16") if not reason_to_skip(dtype, device, toy=toy)]
    source, target = (torch.ones(2**20 if toy else 2**26, device=device) for _ in range(2))
    return {
        **{f"{dtype} GFLOP/s": _product(dtype, device, toy=toy) for dtype in dtypes},
        "copy GB/s": _rate(partial(target.copy_, source), 2 * source.nbytes, device),
        **_exp(device, toy=toy),
    }


def _product(dtype: str, device: str, *, toy: bool) -> float:
    side = 256 if toy else 2048 if device == "cpu" else 8192
    a, b, out = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(3))
    return _rate(partial(torch.mm, a, b, out=out), 2 * side**3, device)


def _exp(device: str, *, toy: bool) -> dict[str, float]:
    # On the CPU a quarter of a megabyte for each thread, which keeps all of them busy.
    cuda, size = device.startswith("cuda"), 2**16 * torch.get_num_threads()
    x = torch.randn(2**24 if cuda and not toy else size, device=device)
    try:
        exp = torch.compile(chain, dynamic=False) if cuda else partial(torch.exp, out=torch.empty_like(x))
        return {"exp G/s": _rate(partial(exp, x), x.numel() * (CHAIN if cuda else 1), device, calls=30)}
    except Exception as error:
        print(f"no ceiling of exp: {report.describe_error(error)}", flush=True)
        return {}


def chain(x: Tensor) -> Tensor:
    """Repeated exp(-x), which stays between 0 and 1 from the second time on."""
    for _ in range(CHAIN):
        x = (-x).exp()
    return x


def _rate(call: Callable[[], object], units: float, device: str, calls: int = 3) -> float:
    call()
    count = measurement.calls_per_sample(call, device)
    times = [measurement.once(call, device, count) for _ in range(calls)]
    return units / measurement.summary(times).median / 1e9


def _processor() -> str:
    with suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()
