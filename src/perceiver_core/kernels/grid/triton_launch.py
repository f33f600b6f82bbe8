"""Launch of the Triton kernels. Launch options are autotuned at the first read of each problem size.

Results are bitwise reproducible, because the options (queries or columns per program, warps, registers, pipeline
stages) do not change the order of any sum. Autotuning synchronizes the CPU with the GPU. Later reads do not.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from perceiver_core.kernels.grid.triton_plan import Options, Plan

# Candidates for autotuning. The first is used where tuning is impossible, such as in CUDA graph capture.
QUERY_OPTIONS_REGISTERS: list[Options] = [
    {"BLOCK": 128, "num_warps": 4},
    {"BLOCK": 128, "num_warps": 4, "maxnreg": 168},
    {"BLOCK": 32, "num_warps": 1},
    {"BLOCK": 32, "num_warps": 1, "maxnreg": 168},
]
QUERY_OPTIONS_MATRIX: list[Options] = [
    {"BLOCK": 32, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 32, "num_warps": 4, "num_stages": 2},
]
TOKEN_OPTIONS_REGISTERS: list[Options] = [{"STRETCH": 32 * warps, "num_warps": warps} for warps in (4, 1, 2)]
TOKEN_OPTIONS_MATRIX: list[Options] = [{"STRETCH": 32, "num_warps": 4, "num_stages": stages} for stages in (1, 2)]

# Errors of the tools with which Triton builds kernels: a missing driver library, compiler or file.
TOOL_ERRORS = (AssertionError, ImportError, OSError, subprocess.SubprocessError)


class NoKernelError(RuntimeError):
    """Error raised if a kernel does not compile or does not fit on the GPU with any of its launch options."""


def launch_over_queries(plan: Plan, kernel: str, *tensors: Tensor) -> None:
    """Launch a kernel whose programs each hold a block of queries and loop over a part of the grid."""
    options = QUERY_OPTIONS_MATRIX if plan.uses_matrix_units else QUERY_OPTIONS_REGISTERS

    def launch(option: Options) -> None:
        blocks = plan.queries // option["BLOCK"]
        num_programs = plan.batch_heads * plan.splits * plan.groups * blocks
        parts = plan.stretches, blocks, plan.splits, plan.groups
        run_kernel(kernel, num_programs, plan, tensors, parts, {"STRETCH": plan.stretch, **option})

    fitting = [option for option in options if plan.queries % option["BLOCK"] == 0]
    _launch_tuned(plan, kernel, launch, fitting, tensors[0].device)


def launch_over_tokens(plan: Plan, kernel: str, *tensors: Tensor) -> None:
    """Launch a kernel whose programs each hold some columns of one row and loop over all queries."""
    block = 16 if plan.constants["PADDED"] <= 4 or plan.uses_matrix_units else 8  # more would exceed the registers

    def launch(option: Options) -> None:
        pieces = -(-plan.width // option["STRETCH"])
        run_kernel(kernel, plan.samples * plan.height * pieces, plan, tensors, (pieces,), {"BLOCK": block, **option})

    options = TOKEN_OPTIONS_MATRIX if plan.uses_matrix_units else TOKEN_OPTIONS_REGISTERS
    _launch_tuned(plan, kernel, launch, options, tensors[0].device)


def run_kernel(
    kernel: str, num_programs: int, plan: Plan, tensors: Sequence[Tensor], parts: Sequence[int], options: Options
) -> None:
    """Launch `num_programs` programs of the function named `kernel` in `triton_kernels`."""
    from perceiver_core.kernels.grid import triton_kernels  # needs Triton, which is optional

    sizes = plan.heads, plan.queries, plan.height, plan.width, plan.padded_width
    getattr(triton_kernels, kernel)[(num_programs,)](*tensors, *sizes, *parts, **plan.constants, **options)


_tuned: dict[tuple[Any, ...], Options] = {}  # fastest options, keyed by kernel, device and sizes


def _launch_tuned(
    plan: Plan, kernel: str, launch: Callable[[Options], None], options: Sequence[Options], device: torch.device
) -> None:
    work = (plan.batch_heads * plan.queries * plan.height * plan.padded_width).bit_length()
    key = (kernel, device, work, plan.queries, *plan.constants.values())
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if key not in _tuned and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # errors of earlier kernels surface here, before tuning
            _tuned[key] = fastest(launch, options)
        launch(_tuned.get(key, options[0]))


def fastest(launch: Callable[[Options], None], options: Sequence[Options]) -> Options:
    """Return the fastest launch options with which the kernel compiles and fits on the GPU.

    Raises:
        NoKernelError: If there are no such options.
    """
    results = [(_milliseconds(launch, option), index) for index, option in enumerate(options)]
    times = [(time, index) for time, index in results if isinstance(time, float)]
    if not times:
        error = results[-1][0]
        raise NoKernelError(str(error)) from error  # type: ignore[misc]
    return options[min(times)[1]]


def _milliseconds(launch: Callable[[Options], None], option: Options) -> float | Exception:
    """Return the shortest of three run times in milliseconds, or the error if the kernel does not compile or fit."""
    try:
        launch(option)
    except Exception as error:
        if not _is_unsupported(error):
            raise
        return error
    return min(_time_once(launch, option) for _ in range(3))  # an illegal memory access surfaces here and is raised


def _is_unsupported(error: Exception) -> bool:
    """Return whether a launch failed because the kernel does not compile or does not fit on the GPU.

    This includes Triton's exceptions, plain RuntimeErrors raised by its driver and compiler passes, and errors of its
    build tools (`TOOL_ERRORS`). It excludes PyTorch's device errors, which are subclasses of RuntimeError. Launches are
    asynchronous, so errors during the execution of a kernel surface later.
    """
    from_triton = any(cls.__module__.partition(".")[0] == "triton" for cls in type(error).__mro__)
    return from_triton or type(error) is RuntimeError or isinstance(error, TOOL_ERRORS)


def _time_once(launch: Callable[[Options], None], option: Options) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    launch(option)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
