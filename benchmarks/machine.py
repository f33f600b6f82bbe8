"""The machine: what it is, and the rates that it reaches at the simplest things, to hold everything else against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import failures, timing

CHAIN = 64  # exponentials of one number after the other, on CUDA


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
        **(_gpu(device) if device.startswith("cuda") else {}),
    }


def ceilings(device: str, *, toy: bool) -> dict[str, float]:
    """The median of several calls each, in units of 10^9 a second.

    A product of two large matrices in float32 (on CUDA as PyTorch is set, which is without TF32) and in bfloat16
    (FLOP), a copy of an array far larger than any cache (bytes read and written), and exponentials: on the CPU, exp of
    an array that fits into the caches; on CUDA, what the units for it can do, by many of them one after the other on
    each number of a large array, in one kernel made by torch.compile, since a single one would wait for memory. Where
    that kernel cannot be made, the last is left out.
    """
    side = 256 if toy else 2048 if device == "cpu" else 8192
    large = 2**20 if toy else 2**26
    source, target = (torch.ones(large, device=device) for _ in range(2))
    return {
        "float32 GFLOP/s": _rate(_product(side, torch.float32, device), 2 * side**3, device),
        "bfloat16 GFLOP/s": _rate(_product(side, torch.bfloat16, device), 2 * side**3, device),
        "copy GB/s": _rate(partial(target.copy_, source), 2 * source.nbytes, device),
        **(_exp_on_cuda(device, toy=toy) if device.startswith("cuda") else _exp(device)),
    }


def _exp(device: str) -> dict[str, float]:
    # As much as keeps all threads of the CPU busy with a quarter of a megabyte each.
    x = torch.randn(2**16 * torch.get_num_threads(), device=device)
    return {"exp G/s": _rate(partial(torch.exp, x, out=torch.empty_like(x)), x.numel(), device, calls=30)}


def _exp_on_cuda(device: str, *, toy: bool) -> dict[str, float]:
    x = torch.randn(2**18 if toy else 2**24, device=device)
    try:
        return {"exp G/s": _rate(partial(_compiled_chain(), x), CHAIN * x.numel(), device)}
    except Exception as error:
        print(f"no ceiling of exp: {failures.words(error)}", flush=True)
        return {}


@cache
def _compiled_chain() -> Callable[[Tensor], Tensor]:
    return torch.compile(chain, dynamic=False)


def chain(x: Tensor) -> Tensor:
    """exp(-x) again and again, which stays between 0 and 1 after the second time."""
    for _ in range(CHAIN):
        x = (-x).exp()
    return x


def _product(side: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return partial(torch.mm, a, b, out=out)


def _rate(call: Callable[[], object], units: float, device: str, calls: int = 5) -> float:
    call()
    count = timing.enough(call, device)
    return units / timing.summary([timing.once(call, device, count) for _ in range(calls)]).median / 1e9


def _gpu(device: str) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": found.multi_processor_count,
        "GPU memory GB": round(found.total_memory / 1e9),
        "L2 cache MB": round(found.L2_cache_size / 1e6),
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        "triton": _version("triton"),
    }


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        answer = []
    return answer[0] if answer else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
