"""An additional key and value of zeros: the formula, masks, every kernel, inside a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import masks
from perceiver_core.kernels import add_zero_attn, chunked, fastest, reference, sdpa

EXACT = {"rtol": 1e-10, "atol": 1e-11}
KERNELS = [reference, sdpa, fastest, partial(chunked, chunk_size=3)]
IDS = ["reference", "sdpa", "fastest", "chunked"]


def given(queries: int, keys: int) -> list[Tensor]:
    shapes = [(2, 3, queries, 5), (2, 3, keys, 5), (2, 3, keys, 4)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    weights = weights if allowed is None else weights * allowed
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


def check(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)
    along = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = [torch.autograd.grad(out, inputs, along, retain_graph=True) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 11), (1, 11), (7, 1), (1, 1)])
def test_the_formula(kernel, queries, keys):
    inputs = given(queries, keys)
    check(add_zero_attn(*inputs, kernel=kernel), written_out(*inputs), inputs)


MASKS = {
    "padding": masks.Padding(torch.arange(11) < torch.tensor([[11], [4]])),
    "no key at all": masks.Padding(torch.arange(11) < torch.tensor([[0], [4]])),
    "queries": masks.Queries(torch.arange(7) < torch.tensor([[7], [4]])),
    "causal": masks.Causal(),
    "window": masks.and_(masks.Window(2, 1), masks.Padding(torch.arange(11) < torch.tensor([[11], [4]]))),
    "tensor": torch.rand(2, 3, 7, 11, generator=torch.Generator().manual_seed(1)) < 0.6,
    "of queries": torch.rand(7, 1, generator=torch.Generator().manual_seed(1)) < 0.6,
    "of keys": torch.rand(11, generator=torch.Generator().manual_seed(1)) < 0.6,
}


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_no_mask_masks_the_zero_token(kernel, mask):
    inputs = given(7, 11)
    allowed = masks.materialize(mask, queries=7, keys=11)
    check(add_zero_attn(*inputs, mask=mask, kernel=kernel), written_out(*inputs, allowed), inputs)


def test_it_equals_add_zero_attn():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True).double()
    ours = pc.MultiHeadAttention(6, num_heads=2, kernel=add_zero_attn).double()
    with torch.no_grad():
        for layer, weight in zip((ours.query, ours.key, ours.value), theirs.in_proj_weight.chunk(3), strict=True):
            layer.weight.copy_(weight)
        ours.output.load_state_dict(theirs.out_proj.state_dict())
    x, tokens = torch.randn(2, 7, 6).double(), torch.randn(2, 11, 6).double()
    there = torch.arange(11) < torch.tensor([[11], [4]])
    expected, _ = theirs(x, tokens, tokens, key_padding_mask=~there)
    torch.testing.assert_close(ours(x, tokens, mask=there), expected, **EXACT)


def test_a_kernel_of_it_is_saved_with_the_model(tmp_path):
    kernel = partial(add_zero_attn, kernel=sdpa)
    read = partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, kernel=kernel, dropout=0.5))
    encoder = pc.Encoder(10, num_latents=5, dim=14, depth=1, num_heads=2, cross_attention=read)
    again, x = pc.load(pc.save(encoder, tmp_path)), torch.randn(2, 11, 10)
    torch.testing.assert_close(again.eval()(x), encoder.eval()(x))
    torch.manual_seed(0)
    assert not torch.allclose(encoder.train()(x), encoder.eval()(x))


@pytest.mark.refusal
def test_invalid_masks_raise():
    with pytest.raises(ValueError, match="mask must broadcast to"):
        add_zero_attn(*given(7, 11), mask=torch.ones(7, 12, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        add_zero_attn(*given(7, 11), mask=torch.ones(7, 11))


@pytest.mark.compile
def test_it_compiles():
    inputs = given(7, 11)
    compiled = torch.compile(partial(add_zero_attn, mask=masks.Causal()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), add_zero_attn(*inputs, mask=masks.Causal()), **EXACT)
