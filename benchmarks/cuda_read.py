"""On a GPU: one read of pictures, layer norms and projections included, by each path and by PyTorch's fused kernels.

All in bfloat16, weights too. What is called compiled is so by torch.compile, as one graph for these sizes. PyTorch's
kernels get what makes them fastest: tokens concatenated, normalized and projected in the same graph, and weights
widened by zeros where a kernel takes no heads of such a width, so that keys and values come out of the product as wide
as it wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_core as pc
from benchmarks import plots, read
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, compete_all
from benchmarks.cuda_attention import BACKENDS
from perceiver_core import reads

Way = Callable[[pc.CrossAttend, Tensor, pc.Tokens], Tensor]

LIMIT = 64  # graphs
PAPER = read.PAPER._replace(batch=32, dtype="bfloat16")
TOY = tuple(each._replace(batch=2, dtype="bfloat16") for each in read.TOY)
FULL = (
    PAPER,
    PAPER._replace(head=64),
    PAPER._replace(heads=8, head=64),
    PAPER._replace(channels=64, head=64),
    PAPER._replace(batch=1),
    PAPER._replace(batch=1, latents=16),
    PAPER._replace(batch=1, latents=1),
)


def fused(backend: str, block: pc.CrossAttend, x: Tensor, tokens: pc.Tokens) -> Tensor:
    """A read as it is mostly written, by one of PyTorch's fused kernels."""
    attention: Any = block.attention
    width = attention.query.out_features // attention.num_heads
    asks, inputs = block.query_norm(x), block.input_norm(tokens.materialize())
    pairs = ((asks, attention.query), (inputs, attention.key), (inputs, attention.value))
    made = (F.linear(tensor, *widened(layer, attention.num_heads)) for tensor, layer in pairs)
    q, k, v = (rearrange(tensor, "b n (h d) -> b h n d", h=attention.num_heads) for tensor in made)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        got = F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]
    return F.linear(rearrange(got, "b h m d -> b m (h d)"), attention.output.weight, attention.output.bias)


def widened(layer: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose heads are wider by zeros, up to a multiple of 8."""
    weight, bias = (rearrange(p, "(h d) ... -> h d ...", h=heads) for p in (layer.weight, layer.bias))
    more = -weight.shape[1] % 8
    return F.pad(weight, (0, 0, 0, more)).flatten(0, 1), F.pad(bias, (0, more)).flatten()


def by_path(path: reads.Strategy, block: pc.CrossAttend, x: Tensor, tokens: pc.Tokens) -> Tensor:
    """A read by this library, on one path."""
    out: Tensor = block.attention(block.query_norm(x), path.read(block.request(tokens, queries=x.shape[1])))
    return out


def compiled(way: Way, *given: Any) -> Tensor:
    """The same by torch.compile."""
    return _compiled(way)(*given)


@cache
def _compiled(way: Way) -> Callable[..., Tensor]:
    def call(*given: Any) -> Tensor:
        return way(*given)

    # All ways are one function to torch.compile. Without `fullgraph` it would quietly be eager where they are too many.
    torch._dynamo.config.recompile_limit = LIMIT
    return torch.compile(call, fullgraph=True, dynamic=False)


PATHS: dict[str, Way] = {
    "dense": partial(by_path, reads.Dense()),
    "factored": partial(by_path, reads.Factored()),
    "structured": partial(by_path, reads.Structured()),
    "library": partial(by_path, reads.Auto()),
}
KERNELS: dict[str, Way] = {name: partial(fused, backend) for name, backend in BACKENDS.items()}
# The first is PyTorch's own choice of kernel, not compiled.
WAYS: dict[str, Way] = {
    "PyTorch": read.READS["sdpa"],
    "PyTorch unfused": read.READS["einsum"],
    **PATHS,
    **{f"{name}, compiled": partial(compiled, PATHS[name]) for name in ("dense", "structured")},
    **{f"PyTorch {name}, compiled": partial(compiled, way) for name, way in KERNELS.items()},
}
REFUSING = ["PyTorch unfused", *(f"PyTorch {name}, compiled" for name in KERNELS)]


def run(setting: Setting) -> Results:
    """Every way at every size."""
    return Results(compete_all(contests(toy=setting.toy), setting), [])


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="One read of pictures on a GPU, norms and projections included, bfloat16")


def contests(*, toy: bool) -> Iterator[Contest]:
    """One a size and direction."""
    for sizes in TOY if toy else FULL:
        for direction in read.DIRECTIONS:
            plain = read.contest(sizes, direction, WAYS)
            yield plain._replace(candidates={name: _may_refuse(name, each) for name, each in plain.candidates.items()})


def _may_refuse(name: str, candidate: Candidate) -> Candidate:
    return candidate._replace(may_refuse=name in REFUSING)
