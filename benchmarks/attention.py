"""Attention alone: m latents read n tokens, by each kernel on their keys and values, and by a structured read.

Keys and values are given to the kernels, made of the very content, positions and weights that the structured read is
given in their place; `read` has the cost of making them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_core as pc
from benchmarks import flops, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete_all
from perceiver_core.kernels import chunked, fastest, reference, sdpa
from perceiver_core.reads.factored import FactoredKeysValues, Norm, attend, factor


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's plain matrix products."""
    with sdpa_kernel(SDPBackend.MATH):
        out: Tensor = sdpa(q, k, v)
    return out


KERNELS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "sdpa unfused": unfused,
    "chunked": chunked,
    "fastest": fastest,
}


class Read(NamedTuple):
    """The sizes of one read."""

    latents: int
    grid: tuple[int, ...]
    heads: int
    width: int  # of a head
    channels: int = 3
    bands: int = 64
    dtype: str = "float32"


TOY = (Read(latents=16, grid=(13, 17), heads=2, width=8, bands=4),)
FULL = (
    Read(latents=256, grid=(64, 64), heads=8, width=64),
    Read(latents=256, grid=(128, 128), heads=8, width=64),
    Read(latents=512, grid=(224, 224), heads=1, width=64),
    Read(latents=512, grid=(224, 224), heads=1, width=261),
    Read(latents=256, grid=(128, 128), heads=8, width=64, dtype="bfloat16"),
    Read(latents=512, grid=(224, 224), heads=1, width=261, dtype="bfloat16"),
)


class State(NamedTuple):
    """Queries, and what they read in two forms."""

    q: Tensor
    k: Tensor
    v: Tensor
    factored: FactoredKeysValues
    leaves: Tensors  # that `factored` was made of: content and the weights of both projections


def run(setting: Setting) -> Results:
    """Every kernel on every read."""
    return Results(compete_all(contests(toy=setting.toy), setting), [])


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="Attention: kernels on queries, keys and values, and a structured read")


def contests(*, toy: bool) -> Iterator[Contest]:
    """One a read and direction."""
    for read in TOY if toy else FULL:
        for direction, step in (("forward", forward), ("with backward", backward)):
            ways = {**{name: partial(by_kernel, kernel) for name, kernel in KERNELS.items()}, "structured": structured}
            yield Contest(
                sizes={**read._asdict(), "grid": " x ".join(map(str, read.grid)), "direction": direction},
                setup=partial(tensors, read),
                candidates={name: Candidate(partial(step, way), read.dtype) for name, way in ways.items()},
                work=partial(_work, read, flops.BACKWARD if direction == "with backward" else 1),
            )


def tensors(read: Read, device: str) -> State:
    """Queries, keys and values, and the tokens and weights that these are made of."""
    torch.manual_seed(0)
    dtype, width = getattr(torch, read.dtype), read.heads * read.width
    where = pc.positions.Fourier(num_axes=len(read.grid), num_bands=read.bands, max_resolution=read.grid)
    dim = read.channels + where.dim
    q = torch.randn(1, read.heads, read.latents, read.width).to(device, dtype).requires_grad_()
    content = torch.randn(1, *read.grid, read.channels).to(device, dtype).requires_grad_()
    key, value = ((torch.randn(width, dim) * dim**-0.5).to(device, dtype).requires_grad_() for _ in range(2))
    tokens = pc.Tokens(content, where.tables(read.grid, like=content))
    factored = factor(tokens, Norm(eps=1e-5), (key, None), (value, None), heads=read.heads)
    with torch.no_grad():
        k, v = factored.formed(dtype)
    return State(q, *(x.contiguous().requires_grad_() for x in (k, v)), factored, (content, key, value))


def by_kernel(kernel: Callable[..., Tensor], given: State) -> tuple[Tensor, Tensors]:
    """What is read of keys and values, and what it depends on."""
    return kernel(given.q, given.k, given.v), (given.q, given.k, given.v)


def structured(given: State) -> tuple[Tensor, Tensors]:
    """What is read of content and positions, and what it depends on."""
    return attend(given.q, given.factored).output, (given.q, *given.leaves)


@torch.no_grad()
def forward(way: Callable[[State], tuple[Tensor, Tensors]], given: State) -> Tensors:
    """What is read."""
    return (way(given)[0],)


def backward(way: Callable[[State], tuple[Tensor, Tensors]], given: State) -> Tensors:
    """What is read, and the gradient by the queries of half the sum of its squares; the others are computed as well."""
    out, leaves = way(given)
    return out.detach(), torch.autograd.grad(out, leaves, out.detach(), retain_graph=True)[0]


def _work(read: Read, passes: int, given: State) -> Work:
    """Of the kernels: all tensors are touched once in the forward pass, and these and their gradients with backward."""
    scores = read.heads * read.latents * prod(read.grid)
    touched = sum(tensor.nbytes for tensor in given[:3]) + given.q.nbytes
    return Work(flops=4 * scores * read.width * passes, exps=scores, moved=touched * (1 if passes == 1 else 2))
