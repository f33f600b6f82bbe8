"""The reference kernel and the attention map."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from perceiver_core.kernels import attention_map, reference
from perceiver_core.masks import Mask
from tests.kernels.cases import (
    DEAD_ROW,
    MASKS,
    B,
    H,
    K,
    Q,
    exact,
    qkv,
)


@pytest.mark.parametrize("mask", [None, DEAD_ROW], ids=["all", "masked"])
def test_the_reference_is_twice_differentiable(mask: Tensor | None) -> None:
    inputs = [x.requires_grad_() for x in qkv(b=1, h=2, q=2, k=3, d=2, e=1)]
    assert torch.autograd.gradgradcheck(partial(reference, mask=mask), inputs)


@pytest.mark.parametrize(("mask", "allowed"), MASKS.values(), ids=MASKS.keys())
def test_attention_map_rows_sum_to_one_or_zero_and_give_the_output(mask: Mask | None, allowed: Tensor | None) -> None:
    q, k, v = qkv()
    weights = attention_map(q, k, mask=mask)
    full = torch.ones(B, H, Q, K, dtype=torch.bool) if allowed is None else allowed.expand(B, H, Q, K)
    torch.testing.assert_close(weights.sum(-1), full.any(-1).double(), rtol=0.0, atol=1e-12)
    assert not weights[~full].any() and (weights[full] > 0).all()
    torch.testing.assert_close(weights @ v, reference(q, k, v, mask=mask), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(weights @ v, exact(q, k, v, allowed), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(("mask", "_"), MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("chosen", [[0], [-1], [3, 1], [-2, 0, 4, 4], []], ids=str)
def test_selected_queries_are_rows_of_the_whole_map(mask: Mask | None, _: Tensor | None, chosen: list[int]) -> None:
    q, k, _v = qkv()
    whole = attention_map(q, k, mask=mask)
    indices = torch.tensor(chosen, dtype=torch.long)
    rows = attention_map(q, k, mask=mask, queries=indices)
    assert rows.shape == (B, H, len(chosen), K)
    torch.testing.assert_close(rows, whole[:, :, indices], rtol=0.0, atol=1e-14)
    if chosen:
        assert torch.equal(attention_map(q, k, mask=mask, queries=chosen), rows)


def test_the_attention_map_of_half_precision_is_float32() -> None:
    q, k, _ = (x.bfloat16() for x in qkv())
    weights = attention_map(q, k)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), attention_map(q.double(), k.double()), rtol=0.0, atol=1e-6)
