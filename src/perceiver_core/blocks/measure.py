"""The numbers of the cost model, measured on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from perceiver_core.attention import fastest
from perceiver_core.attention.factored import Norm, attend, factor
from perceiver_core.attention.structured import native, read_grid
from perceiver_core.blocks.costs import SHORT, Costs
from perceiver_core.linear import Linear
from perceiver_core.tokens import Tokens


@torch.no_grad()
def costs(seconds: float = 2.0) -> Costs:
    """What `Costs` wants to know, by doing each for about so many seconds; for all threads, given for one of them.

    Where no compiler is found, what needs one is left as it is.
    """
    threads = torch.get_num_threads()

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / _median(work, seconds) / threads

    layer, one, half = Linear(2048, 2048), torch.randn(2048, 2048), torch.randn(2048, 2048, dtype=torch.bfloat16)
    large = torch.randn(2**23)
    product = 2 * 2048**3 / 1e9
    narrow, wide, wide_half = (
        threads * 1e9 * _median(_attention(width, dtype), seconds) / _PAIRS
        for width, dtype in ((16, torch.float32), (272, torch.float32), (272, torch.bfloat16))
    )
    each = (wide - narrow) / 256  # nanoseconds for a pair and a unit of width, 4 operations
    softmax = max(narrow - 16 * each, 0.0)
    found = Costs(
        linear=rate(product, lambda: layer(one)),
        matmul=rate(product, lambda: one @ one),
        matmul_half=rate(product, lambda: half @ half),
        attention=4 / each,
        attention_half=4 * 272 / max(wide_half - softmax, 1e-9),
        softmax=softmax,
        copy=rate(2 * large.nbytes / 1e9, lambda: large * 2.0),
        start=1e6 * threads * _median(_tiny_read, seconds),
    )
    if not native.available():
        return found
    few, many = (threads * 1e9 * _median(_grid_read(channels), seconds) / _PAIRS for channels in (4, 68))
    channel = (many - few) / 64
    return replace(found, pair=few - 4 * channel, channel=channel / (1 + SHORT / 192))


_PAIRS = 256 * 128 * 192


def _attention(width: int, dtype: torch.dtype) -> Callable[[], object]:
    q, k, v = (torch.randn(1, 1, n, width, dtype=dtype) for n in (256, 128 * 192, 128 * 192))
    return lambda: fastest(q, k, v)


def _tiny_read() -> object:
    tokens = Tokens(torch.zeros(1, 2, 3, 1), (torch.zeros(2, 1, 5), torch.zeros(1, 3, 5)))
    weights = torch.zeros(8, 6), torch.zeros(8)
    return attend(torch.zeros(1, 1, 1, 8), factor(tokens, Norm(eps=1e-5), weights, weights, heads=1))


def _grid_read(channels: int) -> Callable[[], object]:
    a, u = torch.randn(1, 1, 256, channels), torch.randn(1, 1, 256, 128 + 192)
    content, scale = torch.randn(1, channels, 128, 192), torch.ones(1, 128, 192)
    return lambda: read_grid(a, u, content, scale)


def _median(work: Callable[[], object], seconds: float) -> float:
    """The median time of a call, of as many as fit into a time; three at least, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
