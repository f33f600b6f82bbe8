"""SelfAttend and LatentTransformer against their formulas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from perceiver_core import GEGLU, MLP, LatentTransformer, MultiHeadAttention, SelfAttend, masks
from perceiver_core.reads import KeysValuesCache

DIM, N = 14, 5
EXACT = {"rtol": 0, "atol": 1e-12}


def latents():
    return torch.randn(2, N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(block, x, mask=None):
    normed = block.norm(x)
    x = x + block.attention(normed, normed, mask=mask)
    return x + block.mlp(block.mlp_norm(x))


@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["all", "causal"])
def test_a_self_attend_is_pre_norm_attention_then_mlp(mask):
    block = SelfAttend(DIM, num_heads=7).double()
    torch.testing.assert_close(block(latents(), mask=mask), by_hand(block, latents(), mask), **EXACT)


def test_factories_build_the_parts_of_a_self_attend():
    block = SelfAttend(
        DIM,
        num_heads=3,
        attention=partial(MultiHeadAttention, qk_dim=9, bias=False),
        mlp=partial(MLP, widening_factor=4, activation=GEGLU()),
        norm=nn.RMSNorm,
    )
    assert block.attention.query.weight.shape == (9, DIM)
    assert block.mlp.expand.out_features == 8 * DIM
    assert {type(block.norm), type(block.mlp_norm)} == {nn.RMSNorm}


def test_dropout_is_for_training_only():
    block = SelfAttend(DIM, num_heads=2, dropout=0.5).double().eval()
    torch.testing.assert_close(block(latents()), by_hand(block, latents()), **EXACT)
    torch.manual_seed(0)
    assert not torch.allclose(block.train()(latents()), block(latents()))


@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_run_in_order_with_the_mask(depth):
    transformer = LatentTransformer(DIM, depth=depth, num_heads=2).double()
    x = latents()
    for block in transformer.blocks:
        x = by_hand(block, x, masks.Causal())
    torch.testing.assert_close(transformer(latents(), mask=masks.Causal()), x, **EXACT)
    assert len({id(parameter) for parameter in transformer.parameters()}) == 12 * depth + 4 * depth


def test_depth_0_is_the_identity():
    transformer = LatentTransformer(DIM, depth=0)
    x = latents()
    assert transformer(x) is x
    assert list(transformer.parameters()) == []


def test_a_user_defined_block():
    made = []

    def block(dim, *, num_heads):
        made.append((dim, num_heads))
        return SelfAttend(dim, num_heads=num_heads)

    LatentTransformer(DIM, depth=2, num_heads=7, block=block)
    assert made == [(DIM, 7), (DIM, 7)]


def test_repeats_run_the_same_blocks_again():
    transformer = LatentTransformer(DIM, depth=2, num_heads=2, num_repeats=3).double()
    assert len(transformer.blocks) == 2
    x = latents()
    for _ in range(3):
        for block in transformer.blocks:
            x = by_hand(block, x)
    torch.testing.assert_close(transformer(latents()), x, **EXACT)
    with pytest.raises(ValueError, match="repeats must be a whole number of at least 1"):
        LatentTransformer(DIM, depth=2, num_repeats=0)


@pytest.mark.parametrize(("depth", "repeats"), [(1, 1), (2, 3), (0, 2), (1, 5)])
def test_repeats_equal_consecutive_calls(depth, repeats):
    torch.manual_seed(0)
    once = LatentTransformer(14, depth=depth, num_heads=2).double()
    torch.manual_seed(0)
    often = LatentTransformer(14, depth=depth, num_heads=2, num_repeats=repeats).double()
    assert once.state_dict().keys() == often.state_dict().keys()
    x = torch.randn(2, 5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True, True, False, False, True]])
    expected = x
    for _ in range(repeats):
        expected = once(expected, mask=mask)
    torch.testing.assert_close(often(x, mask=mask), expected)
    if depth:
        pairs = ((expected, once), (often(x, mask=mask), often))
        gradients = [torch.autograd.grad(out.square().sum(), list(made.parameters())) for out, made in pairs]
        torch.testing.assert_close(*gradients)


@pytest.mark.refusal
@pytest.mark.parametrize("repeats", [0, 1.5, 10_001])
def test_invalid_repeats_raise(repeats):
    with pytest.raises(ValueError, match="repeats must be"):
        LatentTransformer(14, depth=1, num_repeats=repeats)


@pytest.mark.parametrize("repeats", [1, 3])
def test_repeats_accept_an_array_in_parts(repeats):
    transformer = LatentTransformer(DIM, depth=2, num_heads=2, num_repeats=repeats).double()
    x, whole = latents(), transformer(latents(), mask=masks.Causal())
    assert transformer.num_layers == 2 * repeats
    caches = [KeysValuesCache() for _ in range(transformer.num_layers)]
    first = transformer(x[:, :3], mask=masks.Causal(), caches=caches)
    last = transformer(x[:, 3:], mask=masks.Causal(), caches=caches)
    torch.testing.assert_close(torch.cat([first, last], 1), whole, **EXACT)
    assert [cache.memory.keys.shape[2] for cache in caches] == [N] * transformer.num_layers
