"""Reads of n inputs by m latents, by each kernel: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from perceiver_core.attention import chunked, reference, sdpa

KERNELS: dict[str, Callable[..., Tensor]] = {"reference": reference, "sdpa": sdpa, "chunked": chunked}


class Read(NamedTuple):
    """The sizes of one read."""

    latents: int
    inputs: int
    heads: int
    width: int  # of a head


TOY = (Read(latents=16, inputs=331, heads=2, width=8),)
FULL = (
    Read(latents=256, inputs=4_096, heads=8, width=64),
    Read(latents=256, inputs=16_384, heads=8, width=64),
    Read(latents=512, inputs=50_176, heads=1, width=64),
    Read(latents=512, inputs=50_176, heads=1, width=261),
)


def run(*, toy: bool, device: str) -> list[dict[str, Any]]:
    """One row a read and direction, with the median milliseconds of every kernel."""
    rows = []
    for read in TOY if toy else FULL:
        q, k, v = _tensors(read, device)
        _agree(q, k, v)
        for direction, step in (("forward", _forward), ("with backward", _backward)):
            calls = {name: partial(step, kernel, q, k, v) for name, kernel in KERNELS.items()}
            seconds = timing.interleaved(calls, rounds=2 if toy else 5, device=device)
            times = {f"{name} ms": 1000 * value for name, value in seconds.items()}
            rows.append({**read._asdict(), "direction": direction, **times})
    return rows


def _tensors(read: Read, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, read.heads, n, read.width) for n in (read.latents, read.inputs, read.inputs)]
    q, k, v = (torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes)
    return q, k, v


def _agree(q: Tensor, k: Tensor, v: Tensor) -> None:
    wanted = _gradients(reference, q, k, v)
    for name, kernel in KERNELS.items():
        for got, want in zip(_gradients(kernel, q, k, v), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def _gradients(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out = kernel(q, k, v)
    return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))


@torch.no_grad()
def _forward(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    kernel(q, k, v)


def _backward(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    torch.autograd.grad(kernel(q, k, v).sum(), (q, k, v))
