"""The numbers of the cost model, measured on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from perceiver_core.kernels import fastest
from perceiver_core.reads.factored import Norm, attend, factor
from perceiver_core.kernels.grid import gpu, native, read_grid
from perceiver_core.reads.costs import Machine, SHORT, USUAL
from perceiver_core.linear import Linear
from perceiver_core.tokens import Tokens


@torch.no_grad()
def costs(seconds: float = 2.0, device: str = "cpu") -> Machine:
    """What `Machine` wants to know, by doing each for about so many seconds.

    Those of a CPU are measured on all threads and given for one of them. Where no compiler is found for the structured
    read, what needs one is left as it is.

    Args:
        seconds: for each.
        device: a CPU, or a CUDA GPU.
    """
    threads, usual = torch.get_num_threads() if device == "cpu" else 1, USUAL[torch.device(device).type]
    batch = 1 if device == "cpu" else 32  # what fills a GPU
    side, pairs = (2048, _PAIRS) if device == "cpu" else (8192, batch * _PAIRS)

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / _median(work, seconds, device) / threads

    def each_pair(work: Callable[[], object]) -> float:
        return threads * 1e9 * _median(work, seconds, device) / pairs

    layer, one = Linear(side, side).to(device), torch.randn(side, side, device=device)
    half, large = one.bfloat16(), torch.randn(2**23 * batch, device=device)
    product = 2 * side**3 / 1e9
    narrow, wide, narrow_half, flash_half, wide_half = (
        each_pair(_attention(batch, width, dtype, device))
        for width, dtype in (
            (16, torch.float32),
            (272, torch.float32),
            (64, torch.bfloat16),
            (256, torch.bfloat16),
            (272, torch.bfloat16),
        )
    )
    each = max(wide - narrow, 1e-9) / 256  # nanoseconds for a pair and a unit of width, 4 operations
    softmax = max(narrow - 16 * each, 0.0) if device == "cpu" else 0.0
    found = Machine(
        linear=rate(product, lambda: layer(one)),
        matmul=rate(product, lambda: one @ one),
        matmul_half=rate(product, lambda: half @ half),
        attention=4 / each,
        attention_half=4 * 256 / max(flash_half - softmax, 1e-9) if device == "cpu" else 4 * 64 / narrow_half,
        attention_wide=4 * 272 / max(wide_half - softmax, 1e-9),
        softmax=softmax,
        copy=rate(2 * large.nbytes / 1e9, lambda: large * 2.0),
        pair=usual.pair,
        channel=usual.channel,
        blocks=usual.blocks
        if device == "cpu"
        else float(torch.cuda.get_device_properties(device).multi_processor_count),
        start=1e6 * threads * _median(partial(_tiny_read, device), seconds, device),
    )
    there = native.available() if device == "cpu" else not gpu.missing(torch.device(device), 4)
    if not there:
        return found
    few, many = (each_pair(_grid_read(batch, channels, device)) for channels in (4, 64))
    channel = (many - few) / 60
    return replace(found, pair=max(few - 4 * channel, 0.0), channel=channel / (1 + SHORT / 192))


_PAIRS = 256 * 128 * 192


def _attention(batch: int, width: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    sizes = (256, 128 * 192, 128 * 192)
    q, k, v = (torch.randn(batch, 1, n, width, dtype=dtype, device=device) for n in sizes)
    return lambda: fastest(q, k, v)


def _tiny_read(device: str) -> object:
    content, *tables = (torch.zeros(*shape, device=device) for shape in ((1, 2, 3, 1), (2, 1, 5), (1, 3, 5)))
    weights = torch.zeros(8, 6, device=device), torch.zeros(8, device=device)
    factored = factor(Tokens(content, tuple(tables)), Norm(eps=1e-5), weights, weights, heads=1)
    return attend(torch.zeros(1, 1, 1, 8, device=device), factored)


def _grid_read(batch: int, channels: int, device: str) -> Callable[[], object]:
    shapes = (batch, 1, 256, channels), (batch, 1, 256, 128 + 192), (batch, channels, 128, 192)
    a, u, content = (torch.randn(shape, device=device) for shape in shapes)
    scale = torch.ones(batch, 128, 192, device=device)
    return lambda: read_grid(a, u, content, scale)


def _median(work: Callable[[], object], seconds: float, device: str) -> float:
    """The median time of a call, of as many as fit into a time; three at least, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
