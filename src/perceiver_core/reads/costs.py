"""What reads cost: how fast a machine is, and what each path has to do.

The numbers decide which path a read takes (`paths.Auto`), so what matters is their ratios. They are those of the
forward pass; the backward pass takes about two to three times as long again, on every path.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.reads.factored import axes_of
from perceiver_core.masks import Mask
from perceiver_core.kernels.varlen import WIDEST
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
@dataclass(frozen=True)
class Machine:
    """How fast one thread of a CPU, or a whole GPU, is at what reads are made of.

    The defaults are those of one thread and were measured on an AMD EPYC (Zen 5) with PyTorch 2.13; `python -m
    perceiver_core costs` measures and prints those of the machine at hand.

    Args:
        linear: linear layers in float32, GFLOP/s.
        matmul: other products of large matrices in float32.
        matmul_half: the same in bfloat16 or float16.
        attention: the products of the default kernel in float32, GFLOP/s.
        attention_half: the same in bfloat16 or float16.
        attention_wide: the same in bfloat16 or float16 for heads wider than 256, which no flash kernel takes on CUDA.
        softmax: the rest of the kernel, nanoseconds for a query and a token.
        copy: reading and writing large tensors, GB/s.
        pair: a structured read, nanoseconds for a query and a token.
        channel: nanoseconds more for each channel of the content, in long rows.
        start: what reads that are not written out take before any work, microseconds of all threads together.
        blocks: how many blocks of 32 queries keep the machine busy with heads wider than 256, whose kernel on CUDA has
            nothing else to share out.
    """

    linear: float = 200.0
    matmul: float = 100.0
    matmul_half: float = 430.0
    attention: float = 88.0
    attention_half: float = 180.0
    attention_wide: float = 180.0
    softmax: float = 0.36
    copy: float = 10.0
    pair: float = 0.37
    channel: float = 0.036
    start: float = 1000.0
    blocks: float = 1.0


MEASURED = Machine()
# Of a GPU of the Hopper kind, estimated and not measured: products and copies by its maker's rates, less what is usual;
# a structured read by the instructions of its loop; the start by the number of kernels launched.
ESTIMATED = Machine(
    linear=45_000.0,
    matmul=45_000.0,
    matmul_half=600_000.0,
    attention=20_000.0,
    attention_half=400_000.0,
    attention_wide=120_000.0,
    softmax=0.0,
    copy=3_500.0,
    pair=0.0006,
    channel=0.0001,
    start=400.0,
    blocks=132.0,
)
USUAL = {"cpu": MEASURED, "cuda": ESTIMATED}
SHORT = 64  # tokens in a row at which sums over the channels take twice as long as in long rows


class Cost(NamedTuple):
    """What a read takes by one path, for all of the batch: predicted."""

    flops: float
    bytes: float
    seconds: float


class Request(NamedTuple):
    """A read to be made: who reads what."""

    norm: nn.Module
    attention: Any  # a module with the projections of `MultiHeadAttention`, or a user's own
    tokens: Tokens | Tensor
    mask: Mask | None  # beside the tokens' own
    queries: int  # of all the reads that will share what is made
    positions: Tensor | None = None  # of the tokens, for rotary, if not one after the other up to the end


class Sizes(NamedTuple):
    """The numbers of a request that costs depend on."""

    batch: int
    n: int  # tokens of a sample
    width: int  # of a token
    channels: int  # of its content
    axes: tuple[int, ...]  # of the grid, those that a table spans together being one
    heads: int
    made: int  # width of a token's keys and values together
    queries: int
    element: int  # bytes
    half: bool
    device: str
    grouped: int = 1  # heads that share their keys and values

    @property
    def threads(self) -> int:
        """How many share the work, of those that costs are given for."""
        return torch.get_num_threads() if self.device == "cpu" else 1

    @property
    def pairs(self) -> int:
        """Scores: queries and tokens that meet, in every head and sample."""
        return self.batch * self.heads * self.queries * self.n

    @property
    def written(self) -> int:
        """Bytes of all tokens, of these normalized, and of their keys and values."""
        return self.batch * self.n * (2 * self.width + self.made) * self.element

    @classmethod
    def of(cls, request: Request) -> Sizes:
        """The sizes of a request.

        Under torch.compile those of the batch and the grid are replaced by usual ones: a choice that depended on them
        would make a graph for one size only.
        """
        tokens, attention = request.tokens, request.attention
        content = tokens.content if isinstance(tokens, Tokens) else tokens
        axes = axes_of(tokens) if isinstance(tokens, Tokens) else (content.shape[1],)
        batch = content.shape[0]
        if torch.compiler.is_compiling():
            batch = 1 if content.device.type == "cpu" else 16
            axes = (65_536,) if len(axes) == 1 else (256,) * len(axes)
        width = tokens.dim if isinstance(tokens, Tokens) else content.shape[-1]
        dtype = checks.product_dtype(content)
        return cls(
            batch=batch,
            n=prod(axes),
            width=width,
            channels=content.shape[-1],
            axes=axes,
            heads=getattr(attention, "num_heads", 1),
            made=getattr(attention, "kv_dim", 2 * width),
            queries=request.queries,
            element=dtype.itemsize,
            half=dtype.itemsize == 2,
            device=content.device.type,
            grouped=getattr(attention, "num_heads", 1) // getattr(attention, "num_kv_heads", getattr(attention, "num_heads", 1)),
        )


def dense(s: Sizes, costs: Machine) -> Cost:
    """Tokens concatenated, normalized and projected; the kernel."""
    moved = s.batch * s.n * (6 * s.width + s.made) * s.element
    products = costs.matmul_half if s.half else costs.linear
    return _ordinary(s, costs, products, flops=2 * s.batch * s.n * s.width * s.made, moved=moved)


def factored(s: Sizes, costs: Machine) -> Cost:
    """The content projected, the tables projected (once a batch), the sum of the two scaled; the kernel."""
    flops = 2 * s.made * (s.batch * s.n * s.channels + sum(s.axes) * (s.width - s.channels))
    moved = s.batch * s.n * (4 * s.made + s.channels) * 4
    cost = _ordinary(s, costs, costs.matmul, flops=flops, moved=moved)
    return cost._replace(seconds=cost.seconds + costs.start * 1e-6)


def structured(s: Sizes, costs: Machine) -> Cost:
    """Small products with the queries and the tables; a few operations for each query and token."""
    places = sum(s.axes)
    small = 2 * s.made * (s.batch * s.queries * (s.channels + places) + places * (s.width - s.channels))
    # What the queries add for each place, and what is summed up there, each copied once; content and scale.
    moved = 4.0 * (8 * s.batch * s.heads * s.queries * places + 4 * s.batch * s.n * (s.channels + 1))
    each = costs.pair + costs.channel * s.channels * (1 + SHORT / s.axes[-1])
    seconds = costs.start * 1e-6 + small / costs.matmul / 1e9 + moved / costs.copy / 1e9 + s.pairs * each * 1e-9
    return Cost(small + s.pairs * (4 * s.channels + 2 * len(s.axes) + 16), moved, seconds)


def _ordinary(s: Sizes, costs: Machine, products: float, *, flops: float, moved: float) -> Cost:
    together = s.made * s.grouped  # widths of all heads
    kernel = 2.0 * s.batch * s.queries * s.n * together
    attention = costs.attention_half if s.half else costs.attention
    if s.half and together > 2 * WIDEST * s.heads:
        busy = min(1.0, s.batch * s.heads * -(-s.queries // 32) / costs.blocks)
        attention = costs.attention_wide * busy
    seconds = (
        flops / products / 1e9 + moved / costs.copy / 1e9 + kernel / attention / 1e9 + s.pairs * costs.softmax * 1e-9
    )
    return Cost(flops + kernel, moved + s.batch * s.n * s.made * s.element, seconds)
