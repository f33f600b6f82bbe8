"""Inverted attention against its formula, with masks, and inside a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import perceiver_core as pc
from perceiver_core import masks
from perceiver_core.kernels import inverted

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over queries, zeros if none may attend, and weights divided by their sum over keys."""
    shares = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    shares = shares if allowed is None else shares * allowed
    total = shares.sum(-2, keepdim=True)
    shares = shares / total.where(total > 0, 1.0)
    total = shares.sum(-1, keepdim=True)
    return shares / total.where(total > 0, 1.0) @ v


SIZES = [(7, 11), (1, 11), (7, 1), (1, 1), (13, 5)]


def given(queries: int, keys: int) -> list[Tensor]:
    shapes = [(2, 3, queries, 5), (2, 3, keys, 5), (2, 3, keys, 4)]
    return [drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def check(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)
    along = drawn(*expected.shape, seed=7)
    gradients = [torch.autograd.grad(out, inputs, along, retain_graph=True) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_the_formula(queries, keys):
    inputs = given(queries, keys)
    check(inverted(*inputs), written_out(*inputs), inputs)


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("shape", ["keys", "queries", "both", "heads"])
def test_masks(queries, keys, shape):
    inputs = given(queries, keys)
    sizes = {"keys": (2, 1, 1, keys), "queries": (2, 1, queries, 1), "both": (queries, keys)}
    size = sizes.get(shape, (2, 3, queries, keys))
    mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.6
    check(inverted(*inputs, mask=mask), written_out(*inputs, mask.expand(2, 3, queries, keys)), inputs)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Window(1, 2)], ids=repr)
def test_mask_rules(mask):
    inputs = given(5, 11)
    check(inverted(*inputs, mask=mask), written_out(*inputs, masks.materialize(mask, queries=5, keys=11)), inputs)


def test_masked_keys_have_no_effect():
    q, k, v = (x.detach() for x in given(7, 11))
    there = torch.arange(11) < torch.tensor([[11], [4]])
    actual = inverted(q, k, v, mask=masks.Padding(there))
    torch.testing.assert_close(actual[1], inverted(q[1:], k[1:, :, :4], v[1:, :, :4])[0], **EXACT)


def test_queries_compete():
    """A key that one query takes is lost to the other queries, which average over the remaining keys."""
    q, k, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[50.0], [0.0]]), torch.tensor([[1.0], [0.0]])
    actual = inverted(*(x[None, None].double() for x in (q, k, v)))[0, 0]
    torch.testing.assert_close(actual, torch.tensor([[2 / 3], [0.0]], dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_query_without_weight_on_any_key_gets_an_average():
    q, k = torch.tensor([[40.0], [-40.0]]), torch.tensor([[40.0], [41.0]])
    actual = inverted(*(x[None, None] for x in (q, k, torch.eye(2))))
    assert actual.isfinite().all()
    torch.testing.assert_close(actual.sum(-1), torch.ones(1, 1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype):
    q, k, v = (x.detach().to(dtype) for x in given(7, 11))
    actual = inverted(q, k, v)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), written_out(*(x.double() for x in (q, k, v))), rtol=2e-2, atol=2e-2)


def test_it_equals_perceiver_pytorch():
    theirs = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    if "inverted_attention" not in theirs.Attention.forward.__code__.co_varnames:
        pytest.skip("this version has none")
    torch.manual_seed(0)
    other = theirs.Attention(6, 10, heads=3, dim_head=5).double()
    ours = pc.MultiHeadAttention(6, 10, num_heads=3, qk_dim=15, bias=False, kernel=inverted).double()
    with torch.no_grad():
        ours.query.weight.copy_(other.to_q.weight)
        ours.key.weight.copy_(other.to_kv.weight[:15])
        ours.value.weight.copy_(other.to_kv.weight[15:])
        ours.output.load_state_dict(other.to_out.state_dict())
    x, tokens, mask = drawn(2, 7, 6), drawn(2, 11, 10), torch.arange(11) < torch.tensor([[11], [4]])
    for there in (None, mask):
        expected = other(x, context=tokens, mask=there, inverted_attention=True)
        torch.testing.assert_close(ours(x, tokens, mask=there), expected, **EXACT)


def test_a_model_with_it_runs_and_is_saved(tmp_path):
    read = partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, kernel=inverted, dropout=0.1))
    encoder = pc.Encoder(10, num_latents=5, dim=14, depth=1, num_heads=2, num_reads=2, cross_attention=read)
    x = torch.randn(2, 11, 10)
    encoder(x).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())
    again = pc.load(pc.save(encoder, tmp_path))
    torch.testing.assert_close(again.eval()(x), encoder.eval()(x))


@pytest.mark.refusal
def test_invalid_masks_raise():
    with pytest.raises(ValueError, match="mask must broadcast to"):
        inverted(*given(7, 11), mask=torch.ones(7, 10, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        inverted(*given(7, 11), mask=torch.ones(7, 11))
