"""What surrounds the Triton kernels: plans, tuning, refusals, and that nothing waits for a GPU. They need none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import perceiver_core
from perceiver_core.kernels.grid import eager, gpu, operator
from perceiver_core.kernels.grid.gpu import FEW, FEW_TOKENS, MANY, MANY_TOKENS, NoKernelError, Options, Plan

CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has a GPU with 132 multiprocessors, it says."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(gpu, "_has_triton", lambda: True)
    monkeypatch.setattr(gpu, "_processors", lambda device: 132)
    monkeypatch.setattr(gpu, "_failed", {})


def plan(batch: int, heads: int, queries: int, channels: int, *grid: int) -> Plan:
    return Plan.of(
        torch.empty(batch, heads, queries, channels, device="meta"),
        torch.empty(batch, channels, *grid, device="meta"),
        None,
    )


def inputs(device: str, *grid: int, masked: bool = True) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (2, 3, 5, 4), (2, 3, 5, sum(grid)), (2, 4, *grid), (2, *grid)
    mask = (torch.rand(2, *grid) < 0.5,) if masked else (None,)
    return tuple(x if x is None else x.to(device) for x in (*(torch.rand(shape) for shape in shapes), *mask))


# What can run


def test_what_is_missing_is_named(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.missing(CUDA, 3) == "" == gpu.missing(CUDA, gpu.WIDEST)
    assert "no compiled loop for mps" in gpu.missing(torch.device("mps"), 3)
    assert f"{gpu.WIDEST} do" in gpu.missing(CUDA, gpu.WIDEST + 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in gpu.missing(CUDA, 3)
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's
    assert "NVIDIA" in gpu.missing(CUDA, 3)
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    assert gpu.missing(CUDA, 3) == "Triton is not installed"


def test_where_no_kernel_can_be_made_reads_are_plain_pytorch_with_a_warning(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NoKernelError("out of shared memory")

    monkeypatch.setattr(Plan, "over_queries", refuse)
    given = inputs("cpu", 3, 7)
    with pytest.warns(UserWarning, match="plain PyTorch, slowly: no kernel could be made: out of shared memory"):
        found = gpu.forward(*given)
    torch.testing.assert_close(found, eager.forward(*given), rtol=0.0, atol=0.0)
    kept = (*found[2:], *found[:2], found[3])
    with pytest.warns(UserWarning, match="out of shared memory"):
        gradients = gpu.backward(*given, *kept, True)
    torch.testing.assert_close(gradients, eager.backward(*given, *kept, True), rtol=0.0, atol=0.0)
    gpu._failed[CUDA] = gpu._failed.pop(torch.device("cpu"))
    assert "out of shared memory" in gpu.missing(CUDA, 3)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Plan, "over_queries", fail)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.forward(*inputs("cpu", 3, 7))


# Tuning


def test_the_fastest_option_is_taken_of_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[Options] = [{"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": 3}]
    times = {1: [3.0, 3.0, 3.0], 3: [2.0, 9.0, 2.5]}

    def launch(option: Options) -> None:
        if option["BLOCK"] == 2:
            raise ValueError("out of resource")

    monkeypatch.setattr(gpu, "_once", lambda launch, option: times[option["BLOCK"]].pop())
    assert gpu.fastest(launch, options) == {"BLOCK": 3}
    with pytest.raises(NoKernelError, match="out of resource"):
        gpu.fastest(launch, options[1:2])


def test_memory_that_ran_out_is_no_verdict_on_a_kernel() -> None:
    def launch(option: Options) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gpu.fastest(launch, FEW)


def test_what_is_tuned_changes_no_order_of_sums() -> None:
    """Of the sizes of a tile, only that one differs along which nothing is added up; where matrix units add, none."""
    assert all(option.keys() <= {"BLOCK", "num_warps", "maxnreg"} for option in FEW)
    assert all(option.keys() <= {"STRETCH", "num_warps"} for option in FEW_TOKENS)
    for listed in (MANY, MANY_TOKENS):
        assert len({tuple((k, v) for k, v in option.items() if k != "num_stages") for option in listed}) == 1


@pytest.mark.parametrize("queries", [1, 32, 33, 64, 100, 512])
@pytest.mark.parametrize("channels", [1, 3, 8, 9, 64])
def test_every_size_has_options(queries: int, channels: int) -> None:
    cut = plan(2, 3, queries, channels, 5, 7)
    listed = FEW if channels <= 8 else MANY
    assert any(cut.queries % option["BLOCK"] == 0 for option in listed)
    assert cut.queries - 32 < queries <= cut.queries and cut.wide % 16 == 0 and cut.wide - cut.stretch < cut.width


# Plans


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 3, 224, 224), (32, 1, 512, 3, 224, 224), (1, 8, 256, 3, 3_000_000), (1, 1, 7, 3, 5)]
)
def test_a_gpu_is_filled_as_far_as_the_grid_can_be_cut(hopper: None, sizes: tuple[int, ...]) -> None:
    cut = plan(*sizes)
    warps = cut.one * cut.queries // 32 * cut.splits * cut.groups
    most = cut.one * cut.queries // 32 * cut.height * cut.stretches
    assert warps >= min(132 * gpu.PROGRAMS, most)
    assert 1 <= cut.splits <= cut.height and 1 <= cut.groups <= cut.stretches


def test_parts_take_no_more_memory_for_more_tokens(hopper: None) -> None:
    """Beside what is returned: rows and columns times queries."""
    for side in (1000, 10_000, 100_000):
        cut = plan(1, 1, 512, 3, side, side)
        parts = cut.groups * cut.height * 2 + cut.splits * cut.wide
        assert parts <= 60 * 2 * side


def test_products_of_sizes_fit_into_the_integers_of_the_kernels(hopper: None) -> None:
    for grid in ((2**30, 3), (3, 2**30), (2**31 - 16,), (2**10, 2**20, 2)):
        cut = plan(1, 1, 1, 3, *grid)
        assert cut.height * cut.splits < 2**31 and cut.stretches * cut.groups < 2**31


# Nothing waits


@pytest.mark.parametrize("grid", [(7,), (3, 20), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_nothing_looks_at_values(grid: tuple[int, ...], masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no values can be read: so no GPU has to be waited for."""
    monkeypatch.setattr(gpu, "_launch", lambda *_: None)
    given = inputs("meta", *grid, masked=masked)
    read, marginals, base, total = gpu.forward(*given)
    assert read.shape == (2, 3, 5, 4) and marginals.shape == (2, 3, 5, sum(grid)) and base.shape == (2, 3, 5)
    gradients = gpu.backward(*given, base, total, read, marginals, total, True)
    assert [x.shape for x in gradients] == [x.shape for x in given[:4]]


def test_devices_must_agree() -> None:
    a, u, content, scale, _ = inputs("cpu", 3, 7)
    with pytest.raises(TypeError, match=r"axis_queries must be torch\.float32 on cpu, like content; got .* on meta"):
        operator._check(a, u.to("meta"), content, scale, None)


# Machine code

COMPILE = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability: int) -> None:
    """Few channels stay in registers, with nothing exchanged between threads; many fit into 99 KB of shared memory."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(Path(perceiver_core.__file__).parents[1])}
    command = [sys.executable, COMPILE, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for found in map(json.loads, done.stdout.splitlines()):
        if found["channels"] <= 4:
            assert found["shared"] == 0 and found["shuffles"] == 0 and found["barriers"] <= 1, found
        assert found["shared"] <= 99 * 1024, found
