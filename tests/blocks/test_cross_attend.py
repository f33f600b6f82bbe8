"""CrossAttend against its formula, for each form of input tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from perceiver_core import MLP, CrossAttend, Encoder, MultiHeadAttention, Tokens, masks, sharing
from perceiver_core.reads import AttentionCapture, KeysValuesCache, SharedMemory
from perceiver_core.reads.dense import project, split_heads

BATCH, QUERIES, GRID, DIM, CHANNELS, POSITIONS = 2, 5, (3, 7), 14, 11, 2
INPUT_DIM, N = CHANNELS + POSITIONS, 21
EXACT = {"rtol": 0, "atol": 1e-12}


def cross_attend(**options):
    torch.manual_seed(0)
    block = CrossAttend(DIM, INPUT_DIM, **options).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def queries():
    return torch.randn(BATCH, QUERIES, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(mask=None):
    generator = torch.Generator().manual_seed(2)
    content = torch.randn(BATCH, *GRID, CHANNELS, dtype=torch.float64, generator=generator)
    rows, columns = GRID
    tables = (
        torch.randn(rows, 1, POSITIONS, dtype=torch.float64, generator=generator),
        torch.randn(1, columns, POSITIONS, dtype=torch.float64, generator=generator),
    )
    return Tokens(content, tables, mask)


def some_mask():
    return torch.rand(BATCH, *GRID, generator=torch.Generator().manual_seed(3)) < 0.6


def shared_memory(block, inputs):
    cache = SharedMemory()
    block(queries(), inputs, cache=cache)
    return cache.memory


def by_hand(block, x, dense, *, residual=True, allowed=None):
    attended = block.attention(block.query_norm(x), block.input_norm(dense), mask=allowed)
    x = x + attended if residual else attended
    return x + block.mlp(block.mlp_norm(x))


@pytest.mark.parametrize("residual", [True, False])
def test_it_is_pre_norm_attention_then_mlp(residual):
    block = cross_attend(residual=residual, num_heads=13)
    x, dense = queries(), tokens().materialize()
    torch.testing.assert_close(block(x, dense), by_hand(block, x, dense, residual=residual), **EXACT)


def test_without_a_residual_only_the_mlp_has_a_skip():
    block = cross_attend(residual=False)
    with torch.no_grad():
        block.attention.output.weight.zero_()
        block.mlp.contract.weight.zero_()
    expected = (block.attention.output.bias + block.mlp.contract.bias).expand(BATCH, QUERIES, DIM)
    torch.testing.assert_close(block(queries(), tokens()), expected, **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_read_like_their_dense_tensor(masked):
    block = cross_attend()
    given = tokens(some_mask() if masked else None)
    mask = masks.Padding(given.flat_mask()) if masked else None
    torch.testing.assert_close(block(queries(), given), block(queries(), given.materialize(), mask=mask), **EXACT)


def test_cached_keys_and_values_give_the_same_output():
    block, cache = cross_attend(), SharedMemory(num_queries=2 * QUERIES)
    first = block(queries(), tokens(some_mask()), cache=cache)
    torch.testing.assert_close(first, block(queries(), tokens(some_mask())), **EXACT)
    for x in (queries(), queries().flip(1)):
        torch.testing.assert_close(block(x, cache.memory), block(x, tokens(some_mask())), **EXACT)


@pytest.mark.parametrize("form", ["tokens", "keys and values"])
def test_the_mask_of_a_call_and_that_of_the_tokens_are_combined(form):
    block = cross_attend()
    present = some_mask()
    allowed = torch.rand(BATCH, 1, QUERIES, N, generator=torch.Generator().manual_seed(4)) < 0.6
    allowed[..., present.flatten(1)[0].nonzero()[0]] = True
    read = tokens(present) if form == "tokens" else shared_memory(block, tokens(present))
    both = allowed & present.flatten(1)[:, None, None]
    expected = by_hand(block, queries(), tokens().materialize(), allowed=both)
    torch.testing.assert_close(block(queries(), read, mask=allowed), expected, **EXACT)


def test_a_fully_masked_query_keeps_its_residual():
    block = cross_attend()
    expected = torch.ones(BATCH, QUERIES, dtype=torch.bool)
    expected[:, 2] = False
    x = queries()
    out = block(x, tokens(), mask=masks.Queries(expected))
    unread = x[:, 2] + block.attention.output.bias
    torch.testing.assert_close(out[:, 2], unread + block.mlp(block.mlp_norm(unread)), **EXACT)


def test_dropout_applies_to_the_residual_branch():
    block = cross_attend(dropout=0.5)
    x = queries()
    torch.testing.assert_close(block(x, tokens()), by_hand(block, x, tokens().materialize()), **EXACT)
    block.train()
    block.mlp = nn.Identity()
    block.mlp_norm = nn.Module()
    block.mlp_norm.forward = torch.zeros_like
    whole = block.eval()(x, tokens()) - x
    added = block.train()(x, tokens()) - x
    kept = added != 0
    torch.testing.assert_close(added[kept], 2 * whole[kept], rtol=1e-9, atol=1e-12)
    assert 0.2 < kept.float().mean() < 0.8


def test_factories_build_the_parts():
    block = CrossAttend(
        DIM,
        INPUT_DIM,
        num_heads=3,
        attention=partial(MultiHeadAttention, qk_dim=21, v_dim=33),
        mlp=partial(MLP, widening_factor=2),
        norm=partial(nn.LayerNorm, eps=1e-3),
    )
    assert (block.attention.num_heads, block.attention.key.out_features, block.attention.value.out_features) == (
        3,
        21,
        33,
    )
    assert block.mlp.expand.out_features == 2 * DIM
    assert [norm.eps for norm in (block.query_norm, block.input_norm, block.mlp_norm)] == [1e-3] * 3


def test_the_attention_map_uses_the_normalized_inputs():
    block = cross_attend(num_heads=13)
    present = some_mask()
    capture = AttentionCapture(queries=[3, 0])
    block(queries(), tokens(present), capture=capture)
    weights = capture.result()
    assert capture.grid == GRID
    assert weights.shape == (BATCH, 13, 2, N)
    allowed = present.flatten(1)[:, None, None].expand_as(weights)
    assert weights[~allowed].eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
    memory = project(block.attention, block.input_norm(tokens().materialize()))
    q = split_heads(block.attention.query(block.query_norm(queries())), 13)
    expected = memory.attention_map(q, block.attention.kernel, mask=masks.Padding(present.flatten(1)))
    torch.testing.assert_close(weights, expected[:, :, [3, 0]], **EXACT)


def test_a_growing_cache_reads_all_tokens_so_far():
    block, cache = cross_attend(num_heads=13), KeysValuesCache()
    x, dense = queries(), tokens().materialize()
    torch.testing.assert_close(block(x, dense[:, :8], cache=cache), by_hand(block, x, dense[:, :8]), **EXACT)
    allowed = torch.rand(BATCH, 1, QUERIES, N, generator=torch.Generator().manual_seed(4)) < 0.6
    out = block(x, dense[:, 8:], mask=allowed, cache=cache)
    torch.testing.assert_close(out, by_hand(block, x, dense, allowed=allowed), **EXACT)


class UserAttention(nn.Module):
    """Attention by a user, which takes tensors and masks only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, inputs, *, mask=None):
        assert isinstance(inputs, torch.Tensor)
        return self.inner(x, inputs, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", ["tokens", "tensor"])
def test_a_user_defined_attention_gets_normalized_tokens_and_the_whole_mask(given, masked):
    block, present = cross_attend(), some_mask() if masked else None
    inputs = tokens(present) if given == "tokens" else tokens().materialize()
    mask = torch.rand(BATCH, 1, QUERIES, N, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[..., 0] = True
    expected = [block(queries(), inputs), block(queries(), inputs, mask=mask)]
    block.attention = UserAttention(block.attention)
    actual = [block(queries(), inputs), block(queries(), inputs, mask=mask)]
    torch.testing.assert_close(actual, expected, **EXACT)


def test_a_user_defined_attention_stores_no_memory():
    """Reads that share their weights read the tokens each time."""
    block, cache = cross_attend(), SharedMemory()
    block.attention = UserAttention(block.attention)
    block(queries(), tokens(), cache=cache)
    assert cache.memory is None
    encoder = Encoder(
        INPUT_DIM, num_latents=QUERIES, dim=DIM, num_reads=3, depth=1, num_heads=2, share=sharing.all_
    ).double()
    expected = encoder(tokens())
    encoder.reads[0].attention = UserAttention(encoder.reads[0].attention)
    torch.testing.assert_close(encoder(tokens()), expected, **EXACT)
