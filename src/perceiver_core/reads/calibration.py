"""Measurement of the machine constants that the cost model uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from perceiver_core.kernels import fastest
from perceiver_core.kernels.grid import missing_kernel, read_grid
from perceiver_core.layers.linear import Linear
from perceiver_core.reads import structured
from perceiver_core.reads.factored_keys_values import Norm, factor
from perceiver_core.reads.machine import DEFAULTS, SHORT_ROW, Machine
from perceiver_core.tokens import Tokens

_PAIRS = 256 * 128 * 192  # queries x rows x columns


@torch.no_grad()
def calibrate(seconds: float = 2.0, device: str = "cpu") -> Machine:
    """Measure the constants of `Machine` on the machine at hand.

    A CPU is measured on all threads, and the result is per thread. Constants of structured reads keep their
    defaults where the compiled loop is unavailable.

    Args:
        seconds: Duration of each measurement.
        device: "cpu", or a CUDA device.
    """
    num_threads = torch.get_num_threads() if device == "cpu" else 1
    defaults = DEFAULTS[torch.device(device).type]
    batch = 1 if device == "cpu" else 32  # enough to fill a GPU
    side, pairs = (2048, _PAIRS) if device == "cpu" else (8192, batch * _PAIRS)

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / _median(work, seconds, device) / num_threads

    def per_pair(work: Callable[[], object]) -> float:
        return num_threads * 1e9 * _median(work, seconds, device) / pairs

    layer, matrix = Linear(side, side).to(device), torch.randn(side, side, device=device)
    half, large = matrix.bfloat16(), torch.randn(2**23 * batch, device=device)
    product = 2 * side**3 / 1e9
    narrow, wide, narrow_half, flash_half, wide_half = (
        per_pair(_attention(batch, width, dtype, device))
        for width, dtype in (
            (16, torch.float32),
            (272, torch.float32),
            (64, torch.bfloat16),
            (256, torch.bfloat16),
            (272, torch.bfloat16),
        )
    )
    per_unit = max(wide - narrow, 1e-9) / 256  # nanoseconds per pair and unit of width, which is 4 operations
    softmax = max(narrow - 16 * per_unit, 0.0) if device == "cpu" else 0.0
    machine = Machine(
        linear=rate(product, lambda: layer(matrix)),
        matmul=rate(product, lambda: matrix @ matrix),
        matmul_half=rate(product, lambda: half @ half),
        attention=4 / per_unit,
        attention_half=4 * 256 / max(flash_half - softmax, 1e-9) if device == "cpu" else 4 * 64 / narrow_half,
        attention_wide=4 * 272 / max(wide_half - softmax, 1e-9),
        softmax=softmax,
        copy=rate(2 * large.nbytes / 1e9, lambda: large * 2.0),
        pair=defaults.pair,
        channel=defaults.channel,
        blocks=defaults.blocks if device == "cpu" else _num_multiprocessors(device),
        start=1e6 * num_threads * _median(partial(_tiny_read, device), seconds, device),
    )
    if missing_kernel(torch.device(device), 4):
        return machine
    few, many = (per_pair(_grid_read(batch, channels, device)) for channels in (4, 64))
    channel = (many - few) / 60
    return replace(machine, pair=max(few - 4 * channel, 0.0), channel=channel / (1 + SHORT_ROW / 192))


def _attention(batch: int, width: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    sizes = (256, 128 * 192, 128 * 192)
    q, k, v = (torch.randn(batch, 1, n, width, dtype=dtype, device=device) for n in sizes)
    return lambda: fastest(q, k, v)


def _tiny_read(device: str) -> object:
    content, *tables = (torch.zeros(*shape, device=device) for shape in ((1, 2, 3, 1), (2, 1, 5), (1, 3, 5)))
    weights = torch.zeros(8, 6, device=device), torch.zeros(8, device=device)
    tokens = Tokens(content, tuple(tables))
    memory = factor(tokens, Norm(eps=1e-5), weights, weights, num_heads=1, attend_slab=structured.attend_slab)
    return memory.attend_with_lse(torch.zeros(1, 1, 1, 8, device=device))


def _grid_read(batch: int, channels: int, device: str) -> Callable[[], object]:
    shapes = (batch, 1, 256, channels), (batch, 1, 256, 128 + 192), (batch, channels, 128, 192)
    content_queries, axis_queries, content = (torch.randn(shape, device=device) for shape in shapes)
    scale = torch.ones(batch, 128, 192, device=device)
    return lambda: read_grid(content_queries, axis_queries, content, scale)


def _num_multiprocessors(device: str) -> float:
    return float(torch.cuda.get_device_properties(device).multi_processor_count)


def _median(work: Callable[[], object], seconds: float, device: str) -> float:
    """Return the median time of a call, over at least three calls and `seconds`, after one for warm-up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
