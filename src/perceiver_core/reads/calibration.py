"""Benchmarks that measure the constants of the cost model (`Machine`) on the current machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from perceiver_core.kernels import fastest
from perceiver_core.kernels.grid import missing_kernel, read_grid
from perceiver_core.layers.linear import apply_linear
from perceiver_core.reads import structured
from perceiver_core.reads.factored_keys_values import Norm, factor
from perceiver_core.reads.machine import DEFAULTS, SHORT_ROW, Machine
from perceiver_core.tokens import Tokens

QUERIES, ROWS, COLUMNS = 256, 128, 192


@torch.no_grad()
def calibrate(seconds: float = 2.0, device: str = "cpu") -> Machine:
    """Measure the constants of `Machine` on the current machine.

    CPU benchmarks use all of PyTorch's threads, and the results are converted to constants per thread. If the compiled
    kernel for structured reads is unavailable, `pair` and `channel` keep their defaults.

    Args:
        seconds: Minimum duration of each benchmark, in seconds.
        device: "cpu" or a CUDA device.
    """
    cpu = device == "cpu"
    num_threads = torch.get_num_threads() if cpu else 1
    defaults = DEFAULTS[torch.device(device).type]
    side, batch = (2048, 1) if cpu else (8192, 32)  # enough to fill a GPU

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / _median(work, seconds) / num_threads

    def per_pair(work: Callable[[], object]) -> float:
        return num_threads * 1e9 * _median(work, seconds) / (batch * QUERIES * ROWS * COLUMNS)

    def attention(width: int, dtype: torch.dtype) -> float:
        sizes = (QUERIES, ROWS * COLUMNS, ROWS * COLUMNS)
        q, k, v = (torch.randn(batch, 1, n, width, dtype=dtype, device=device) for n in sizes)
        return per_pair(lambda: fastest(q, k, v))

    def grid_read(channels: int) -> float:
        shapes = (1, QUERIES, channels), (1, QUERIES, ROWS + COLUMNS), (channels, ROWS, COLUMNS)
        content_queries, axis_queries, content = (torch.randn(batch, *shape, device=device) for shape in shapes)
        scale = torch.ones(batch, ROWS, COLUMNS, device=device)
        return per_pair(lambda: read_grid(content_queries, axis_queries, content, scale))

    def tiny_read() -> object:
        content, *tables = (torch.zeros(*shape, device=device) for shape in ((1, 2, 3, 1), (2, 1, 5), (1, 3, 5)))
        weights = torch.zeros(8, 6, device=device), torch.zeros(8, device=device)
        tokens = Tokens(content, tuple(tables))
        memory = factor(tokens, Norm(eps=1e-5), weights, weights, num_heads=1, attend_slab=structured.attend_slab)
        return memory.attend_with_lse(torch.zeros(1, 1, 1, 8, device=device))

    layer, matrix = nn.Linear(side, side).to(device), torch.randn(side, side, device=device)
    half, large = matrix.bfloat16(), torch.randn(2**23 * batch, device=device)
    product = 2 * side**3 / 1e9
    narrow, wide = (attention(width, torch.float32) for width in (16, 272))
    narrow_half, flash_half, wide_half = (attention(width, torch.bfloat16) for width in (64, 256, 272))
    per_unit = max(wide - narrow, 1e-9) / 256  # nanoseconds per score and unit of head dimension (4 FLOPs)
    softmax = max(narrow - 16 * per_unit, 0.0) if cpu else 0.0
    machine = Machine(
        linear=rate(product, lambda: apply_linear(layer, matrix)),
        matmul=rate(product, lambda: matrix @ matrix),
        matmul_half=rate(product, lambda: half @ half),
        attention=4 / per_unit,
        attention_half=4 * 256 / max(flash_half - softmax, 1e-9) if cpu else 4 * 64 / narrow_half,
        attention_wide=4 * 272 / max(wide_half - softmax, 1e-9),
        softmax=softmax,
        copy=rate(2 * large.nbytes / 1e9, lambda: large * 2.0),
        pair=defaults.pair,
        channel=defaults.channel,
        blocks=defaults.blocks if cpu else float(torch.cuda.get_device_properties(device).multi_processor_count),
        start=1e6 * num_threads * _median(tiny_read, seconds),
    )
    if missing_kernel(torch.device(device), 4):
        return machine
    few, many = grid_read(4), grid_read(64)
    channel = max((many - few) / 60, 0.0)
    return replace(machine, pair=max(few - 4 * channel, 0.0), channel=channel / (1 + SHORT_ROW / COLUMNS))


def _median(work: Callable[[], object], seconds: float) -> float:
    """Return the median time of calling `work`, in seconds, after a warm-up and with CUDA synchronization."""
    from torch.utils.benchmark import Timer  # not needed otherwise

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
