"""Laws that every attention kernel obeys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perceiver_core import Tokens, masks
from tests.kernels.cases import (
    B,
    D,
    H,
    K,
    Kernel,
    Q,
    agree,
    bools,
    draw,
    kernels,
    laws,
    qkv,
    seeds,
    with_gradients,
)


@kernels
@laws
@given(seed=seeds, n=st.integers(1, 13))
def test_the_order_of_tokens_does_not_matter(kernel: Kernel, seed: int, n: int) -> None:
    q, k, v = qkv(k=n, seed=seed)
    mask = bools(B, 1, Q, n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = kernel(q, k[:, :, order], v[:, :, order], mask=mask[..., order])
    torch.testing.assert_close(shuffled, kernel(q, k, v, mask=mask), rtol=0.0, atol=1e-10)


@kernels
@laws
@given(seed=seeds, junk=st.floats(-1e6, 1e6, width=32))
def test_masked_tokens_have_no_effect(kernel: Kernel, seed: int, junk: float) -> None:
    q, k, v = qkv(seed=seed)
    pad = bools(B, K, seed=seed)
    gone = ~pad[:, None, :, None]
    results = with_gradients(kernel, [q, k, v], mask=masks.Padding(pad))
    changed = with_gradients(
        kernel, [q, k.masked_fill(gone, junk), v.masked_fill(gone, -junk)], mask=masks.Padding(pad)
    )
    agree(changed, results, 1e-10)
    _, _, d_k, d_v = changed
    assert not d_k.masked_select(gone).any() and not d_v.masked_select(gone).any()


@kernels
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_nan_after_tokens_dense(kernel: Kernel, junk: float) -> None:
    pad = bools(B, K, seed=6)
    content = draw(B, K, D)

    def read(content: Tensor) -> list[Tensor]:
        leaf = content.requires_grad_()
        x = Tokens(leaf, mask=pad).materialize()[:, None]
        out = kernel(draw(B, 1, Q, D, seed=1), x, x, mask=masks.Padding(pad))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]

    clean = read(content.clone())
    for a, b in zip(read(content.masked_fill(~pad[..., None], junk)), clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


@kernels
@laws
@given(seed=seeds)
def test_samples_and_heads_are_independent(kernel: Kernel, seed: int) -> None:
    inputs, others = qkv(seed=seed), qkv(seed=seed + 7)
    mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip(inputs, others, strict=True)]
    torch.testing.assert_close(kernel(*mixed)[0], kernel(*inputs)[0], rtol=0.0, atol=1e-12)
    one_head = kernel(*(x[:, 1:2] for x in inputs))
    torch.testing.assert_close(one_head, kernel(*inputs)[:, 1:2], rtol=0.0, atol=1e-12)


@kernels
@laws
@given(seed=seeds, shift=st.floats(-50, 50))
def test_shifts_of_all_scores_and_of_all_values(kernel: Kernel, seed: int, shift: float) -> None:
    """The same number added to every key's score changes nothing; added to every value, it is added to the output."""
    q, k, v = qkv(seed=seed)
    out = kernel(q, k, v)
    torch.testing.assert_close(kernel(q, k + shift * draw(B, H, 1, D), v), out, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(kernel(q, k, v + shift), out + shift, rtol=0.0, atol=1e-10)
