"""Softmax attention as a formula in float64, and the kernels, inputs and masks that are tested against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from perceiver_core import masks
from perceiver_core.kernels import chunked, reference, sdpa
from perceiver_core.masks import Mask

B, H, Q, K, D, E = 2, 3, 5, 11, 7, 13
CHUNKS = (1, 3, 64)
KERNELS = {"reference": reference, "sdpa": sdpa, **{f"chunked{c}": partial(chunked, chunk_size=c) for c in CHUNKS}}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
laws = settings(max_examples=20, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**16)
Kernel = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(b: int = B, h: int = H, q: int = Q, k: int = K, d: int = D, e: int = E, seed: int = 0) -> list[Tensor]:
    return [draw(b, h, q, d, seed=seed), draw(b, h, k, d, seed=seed + 1), draw(b, h, k, e, seed=seed + 2)]


def exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention over the allowed keys; zeros for queries without any."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    here = torch.ones_like(scores) if allowed is None else allowed.expand_as(scores).double()
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * here
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhke->bhqe", weights / total.where(total > 0, 1.0), v)


def with_gradients(kernel: Kernel, inputs: list[Tensor], **kwargs: Mask | None) -> list[Tensor]:
    """Returns the output and the gradients of an unevenly weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = kernel(*leaves, **kwargs)
    probe = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out.double() * probe).sum(), leaves)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        scale = max(1.0, float(e.abs().max()) if e.numel() else 0.0)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=0.0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def check(kernel: Kernel, inputs: list[Tensor], mask: Mask | None, allowed: Tensor | None, tolerance: float) -> None:
    expected = with_gradients(partial(exact, allowed=allowed), [x.double() for x in inputs])
    agree(with_gradients(kernel, inputs, mask=mask), expected, tolerance)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def grid_of(rule: Callable[[int, int], bool]) -> Tensor:
    """Mask of a rule of absolute positions, with queries and keys aligned at the end; evaluated pair by pair."""
    return torch.tensor([[rule(i + K - Q, j) for j in range(K)] for i in range(Q)])


PAD, WANTED, ANY = bools(B, K, seed=3), bools(B, Q, seed=4), bools(H, 1, K, seed=5)
CAUSAL, NEAR = grid_of(lambda i, j: j <= i), grid_of(lambda i, j: i - 3 <= j <= i + 1)
MASKS: dict[str, tuple[Mask | None, Tensor | None]] = {
    "none": (None, None),
    "padding": (masks.Padding(PAD), PAD[:, None, None, :]),
    "padding of all samples": (masks.Padding(PAD[:1]), PAD[:1, None, None, :]),
    "queries": (masks.Queries(WANTED), WANTED[:, None, :, None]),
    "causal": (masks.Causal(), CAUSAL),
    "window": (masks.Window(before=3, after=1), NEAR),
    "and": (masks.and_(masks.Causal(), None, masks.Padding(PAD), ANY), CAUSAL & PAD[:, None, None, :] & ANY),
    "or": (masks.or_(masks.Window(3, 1), masks.Padding(PAD), ANY), NEAR | PAD[:, None, None, :] | ANY),
    "function": (lambda q, k: (q[:, None] + k) % 3 != 0, grid_of(lambda i, j: (i + j - 2 * K) % 3 != 0)),
    "function of keys": (lambda q, k: k % 2 == 0, torch.tensor([(j - K) % 2 == 0 for j in range(K)])),
}
DEAD_ROW = torch.tensor([[True, False, True], [False, False, False]])
