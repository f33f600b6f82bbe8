"""Attention weights of a kernel: times the values, they give its output."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import perceiver_core as pc
from perceiver_core import masks
from perceiver_core.kernels import add_zero_attn, chunked, fastest, inverted, kernel_attention_map, reference, sdpa
from perceiver_core.reads import AttentionCapture

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def own(q, k, v, *, mask=None):
    """A user-defined kernel without softmax."""
    scores = (q @ k.mT).relu()
    return (scores if mask is None else scores * masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2])) @ v


KERNELS = {
    "fastest": fastest,
    "sdpa": sdpa,
    "chunked": partial(chunked, chunk_size=3),
    "reference": reference,
    "inverted": inverted,
    "zero token": add_zero_attn,
    "zero token, chunked": partial(add_zero_attn, kernel=partial(chunked, chunk_size=3)),
    "a user's": own,
}


def inputs(queries=5, keys=11):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 7, generator=generator, dtype=torch.float64) for n in (queries, keys, keys)]


@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("keys", [1, 11])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_weights_times_values_are_the_output(kernel, masked, keys, block):
    q, k, v = inputs(keys=keys)
    mask = masks.Padding(torch.arange(keys) < torch.tensor([[keys], [max(1, keys - 4)]])) if masked else None
    actual = kernel_attention_map(kernel, q, k, mask=mask, block=block)
    torch.testing.assert_close(actual @ v, kernel(q, k, v, mask=mask), **EXACT)
    chosen = kernel_attention_map(kernel, q, k, mask=mask, queries=[4, 0], block=block)
    torch.testing.assert_close(chosen, actual[:, :, [4, 0]], **EXACT)


@pytest.mark.parametrize("kernel", [inverted, add_zero_attn], ids=["inverted", "zero token"])
def test_attention_maps_of_blocks_are_those_of_their_kernel(kernel):
    torch.manual_seed(0)
    attention = partial(pc.MultiHeadAttention, kernel=kernel)
    read = pc.CrossAttend(12, 10, num_heads=2, attention=attention, mlp=None, residual=False).double()
    x, tokens = torch.randn(2, 5, 12).double(), torch.randn(2, 11, 10).double()
    values = read.attention.value(read.input_norm(tokens)).unflatten(-1, (2, -1)).transpose(1, 2)
    capture = AttentionCapture()
    expected = read(x, tokens, capture=capture)
    attended = (capture.result() @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(read.attention.output(attended), expected, **EXACT)


def test_a_zero_token_takes_its_share():
    q, k, _ = inputs()
    assert (kernel_attention_map(add_zero_attn, q, k).sum(-1) < 1).all()
    torch.testing.assert_close(kernel_attention_map(inverted, q, k).sum(-1), torch.ones(2, 3, 5).double())
