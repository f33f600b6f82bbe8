"""Attention alone: m latents read n keys and values, by each kernel, forward and with its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import flops, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete
from perceiver_core.attention import chunked, fastest, reference, sdpa

KERNELS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "chunked": chunked,
    "fastest": fastest,
}


class Read(NamedTuple):
    """The sizes of one read."""

    latents: int
    inputs: int
    heads: int
    width: int  # of a head
    dtype: str = "float32"


TOY = (Read(latents=16, inputs=331, heads=2, width=8),)
FULL = (
    Read(latents=256, inputs=4_096, heads=8, width=64),
    Read(latents=256, inputs=16_384, heads=8, width=64),
    Read(latents=512, inputs=50_176, heads=1, width=64),
    Read(latents=512, inputs=50_176, heads=1, width=261),
    Read(latents=256, inputs=16_384, heads=8, width=64, dtype="bfloat16"),
    Read(latents=512, inputs=50_176, heads=1, width=261, dtype="bfloat16"),
)


def run(setting: Setting) -> Results:
    """Every kernel on every read."""
    return Results([row for contest in contests(toy=setting.toy) for row in compete(contest, setting)], [])


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="Attention: kernels on queries, keys and values")


def contests(*, toy: bool) -> Iterator[Contest]:
    """One a read and direction."""
    for read in TOY if toy else FULL:
        for direction, step in (("forward", forward), ("with backward", backward)):
            yield Contest(
                sizes={**read._asdict(), "direction": direction},
                setup=partial(tensors, read),
                candidates={name: Candidate(partial(step, kernel), read.dtype) for name, kernel in KERNELS.items()},
                work=partial(_work, read, flops.BACKWARD if direction == "with backward" else 1),
            )


def tensors(read: Read, device: str) -> Tensors:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, read.heads, n, read.width) for n in (read.latents, read.inputs, read.inputs)]
    dtype = getattr(torch, read.dtype)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


@torch.no_grad()
def forward(kernel: Callable[..., Tensor], qkv: Tensors) -> Tensors:
    """What is read."""
    return (kernel(*qkv),)


def backward(kernel: Callable[..., Tensor], qkv: Tensors) -> Tensors:
    """What is read, and the gradients of half the sum of its squares."""
    out = kernel(*qkv)
    return (out.detach(), *torch.autograd.grad(out, qkv, out.detach()))


def _work(read: Read, passes: int, qkv: Tensors) -> Work:
    """All tensors are touched once in the forward pass, and so are all and their gradients with the backward one."""
    scores = read.heads * read.latents * read.inputs
    touched = sum(tensor.nbytes for tensor in qkv) + qkv[0].nbytes
    return Work(flops=4 * scores * read.width * passes, exps=scores, moved=touched * (1 if passes == 1 else 2))
