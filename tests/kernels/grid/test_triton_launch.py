"""Tuning of the Triton kernels: the fastest option that works is taken, and errors of a device are raised."""

from __future__ import annotations

import subprocess

import pytest
import torch

from perceiver_core.kernels.grid import triton_launch
from perceiver_core.kernels.grid.triton_launch import (
    QUERY_OPTIONS_MATRIX,
    QUERY_OPTIONS_REGISTERS,
    TOKEN_OPTIONS_MATRIX,
    TOKEN_OPTIONS_REGISTERS,
    NoKernelError,
    fastest,
)
from perceiver_core.kernels.grid.triton_plan import Options


class TritonError(Exception):
    """Stand-in for Triton's errors, which are known by their module."""

    __module__ = "triton.errors"


class OutOfResourcesError(TritonError):
    __module__ = "somewhere.else"  # a base class of Triton's suffices


def raising(error: Exception):  # type: ignore[no-untyped-def]
    def launch(option: Options) -> None:
        raise error

    return launch


UNSUPPORTED = [
    TritonError("PTXAS error: ..."),
    OutOfResourcesError("out of resource: shared memory"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError("ptxas"),
    ImportError("cuda_utils.so"),
    AssertionError("libcuda.so cannot found!"),
]


@pytest.mark.parametrize("error", UNSUPPORTED, ids=lambda error: type(error).__name__)
def test_the_fastest_option_is_taken_of_those_that_work(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Options] = [{"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3}]
    times = {1: [3.0, 3.0, 3.0], 3: [2.0, 9.0, 2.5]}

    def launch(option: Options) -> None:
        if option["BLOCK"] == 2:
            raise error

    monkeypatch.setattr(triton_launch, "_time_once", lambda launch, option: times[option["BLOCK"]].pop())
    assert fastest(launch, options) == {"BLOCK": 3}
    with pytest.raises(NoKernelError) as raised:
        fastest(launch, options[1:2])
    assert str(raised.value) == str(error) and raised.value.__cause__ is error


DEVICE_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError)("CUDA error: an illegal memory access was encountered"),
    TypeError("forward() missing 1 required positional argument"),
    KeyError("BLOCK"),
]


@pytest.mark.parametrize("error", DEVICE_ERRORS, ids=lambda error: type(error).__name__)
def test_other_errors_are_no_verdict_on_an_option(error: Exception) -> None:
    """Memory ran out, an earlier kernel failed, or the launch is wrong."""
    with pytest.raises(type(error)):
        fastest(raising(error), QUERY_OPTIONS_REGISTERS)


def test_an_error_of_the_running_kernel_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access surfaces while the kernel is timed, because the launch is asynchronous."""

    def time_once(launch: object, option: Options) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(triton_launch, "_time_once", time_once)
    with pytest.raises(RuntimeError, match="illegal memory access") as raised:
        fastest(lambda option: None, QUERY_OPTIONS_REGISTERS)
    assert not isinstance(raised.value, NoKernelError)


def test_errors_of_the_installed_triton_are_known() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    compiler_errors = pytest.importorskip("triton.compiler.errors")
    known = [
        errors.OutOfResources(200_000, 99 * 1024, "shared memory"),
        compiler_errors.CompilationError(None, None, "invalid operand"),
    ]
    if hasattr(errors, "PTXASError"):  # not in Triton 3.2, which raises a RuntimeError
        known.append(errors.PTXASError("ptxas fatal"))
    for error in known:
        assert triton_launch._is_unsupported(error)


def test_options_do_not_change_the_order_of_sums() -> None:
    """Only the size of a tile along which nothing is summed differs; on matrix units, which sum, none does."""
    assert all(option.keys() <= {"BLOCK", "num_warps", "maxnreg"} for option in QUERY_OPTIONS_REGISTERS)
    assert all(option.keys() <= {"STRETCH", "num_warps"} for option in TOKEN_OPTIONS_REGISTERS)
    for options in (QUERY_OPTIONS_MATRIX, TOKEN_OPTIONS_MATRIX):
        assert len({tuple((k, v) for k, v in option.items() if k != "num_stages") for option in options}) == 1
