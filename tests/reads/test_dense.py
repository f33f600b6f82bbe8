"""Dense reads: keys and values of all tokens, how queries attend to them, and their cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perceiver_core import masks
from perceiver_core.kernels import reference
from perceiver_core.positions import Rotary
from perceiver_core.reads import Dense, KeysValues, Machine, Sizes
from perceiver_core.reads.dense import project, rotate, split_heads
from tests.reads.cases import EXACT, read_of, tokens_of

B, N, Q = 2, 11, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_computes_every_read():
    tokens = tokens_of((5, 13))
    read = read_of(tokens, rotary=Rotary(2), qk_norm=nn.LayerNorm)
    for inputs in (tokens, tokens.materialize()):
        assert Dense().why_not(read.read_context(inputs, mask=masks.Causal())) == ""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["tokens", "tensor"])
def test_keys_and_values_of_all_tokens(form, masked):
    tokens = tokens_of((5, 13), masked=masked)
    read = read_of(tokens, qk_norm=nn.LayerNorm, rotary=Rotary(2))
    inputs = tokens if form == "tokens" else tokens.materialize()
    memory = Dense().prepare(read.read_context(inputs))
    normalized = read.input_norm(tokens.materialize())
    keys = read.attention.key_norm(read.attention.key(normalized).unflatten(-1, (2, 7)).transpose(1, 2))
    values = read.attention.value(normalized).unflatten(-1, (2, 11)).transpose(1, 2)
    torch.testing.assert_close(memory.keys, read.attention.rotary(keys), **EXACT)
    torch.testing.assert_close(memory.values, values, **EXACT)
    if masked and form == "tokens":
        assert torch.equal(memory.mask.keys, tokens.flat_mask())
    else:
        assert memory.mask is None


def test_projection_at_given_positions():
    tokens = tokens_of((5, 13))
    attention = read_of(tokens, rotary=Rotary(2)).attention
    inputs, places = tokens.materialize(), torch.randperm(65, generator=torch.Generator().manual_seed(0))
    keys = attention.key(inputs).unflatten(-1, (2, 7)).transpose(1, 2)
    memory = project(attention, inputs, places)
    torch.testing.assert_close(memory.keys, attention.rotary(keys, places), **EXACT)
    assert (memory.keys - project(attention, inputs).keys).abs().max() > 1e-3


def test_without_rotary_embeddings_positions_have_no_effect():
    heads = draw(B, 3, N, 4)
    assert rotate(nn.Identity(), heads, torch.arange(N)) is heads


def test_heads_are_consecutive_channels():
    x = draw(B, N, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (B, 3, N, 4)
    assert torch.equal(heads[:, 1], x[..., 4:8])


class TestKeysValues:
    def test_the_mask_of_a_call_is_combined_with_its_own(self):
        own = masks.Padding(torch.rand(B, N, generator=torch.Generator().manual_seed(1)) < 0.7)
        memory, q = KeysValues(draw(B, 3, N, 4), draw(B, 3, N, 6, seed=1), own), draw(B, 3, Q, 4, seed=2)
        band = masks.Window(before=6, after=2)
        out = memory.attend(q, reference, mask=band)
        expected = reference(q, memory.keys, memory.values, mask=masks.and_(own, band))
        torch.testing.assert_close(out, expected, **EXACT)
        torch.testing.assert_close(memory.attend(q, reference), reference(q, *memory[:2], mask=own), **EXACT)
        weights = memory.attention_map(q, reference, mask=band)
        torch.testing.assert_close(weights @ memory.values, expected, **EXACT)
        torch.testing.assert_close(memory.attention_map(q, reference, mask=band, queries=3), weights[:, :, 3:4])

    @pytest.mark.parametrize("groups", [1, 2, 6])
    @pytest.mark.parametrize("batches", [(B, B), (1, B), (B, 1), (1, 1)], ids=str)
    def test_heads_and_samples_broadcast(self, groups, batches):
        memory = KeysValues(draw(batches[1], groups, N, 4), draw(batches[1], groups, N, 5, seed=1))
        q = draw(batches[0], 6, Q, 4, seed=2)
        batch = max(batches)
        keys, values = (x.repeat_interleave(6 // groups, 1).expand(batch, -1, -1, -1) for x in memory[:2])
        expected = reference(q.expand(batch, -1, -1, -1), keys, values)
        torch.testing.assert_close(memory.attend(q, reference), expected, **EXACT)
        weights = memory.attention_map(q, reference, queries=[4, 1])
        torch.testing.assert_close(weights @ values, expected[:, :, [4, 1]], **EXACT)

    @pytest.mark.parametrize("rate", [0.0, 0.25])
    def test_kernels_get_dropout_only_if_there_is_some(self, rate):
        seen = []

        def kernel(q, k, v, **options):
            seen.append(options)
            return reference(q, k, v)

        KeysValues(draw(B, 3, N, 4), draw(B, 3, N, 5)).attend(draw(B, 3, Q, 4), kernel, dropout=rate)
        assert seen == [{"mask": None, "dropout": rate} if rate else {"mask": None}]

    @pytest.mark.refusal
    def test_masks_of_parts_cannot_be_appended(self):
        first = KeysValues(draw(B, 3, 4, 4), draw(B, 3, 4, 5), masks.Padding(torch.ones(B, 4, dtype=torch.bool)))
        later = KeysValues(draw(B, 3, 7, 4, seed=1), draw(B, 3, 7, 5, seed=1))
        for one, other in ((first, later), (later, first)):
            with pytest.raises(ValueError, match="with a mask of their own cannot be appended"):
                one.append(other)

    def test_later_keys_are_appended(self):
        first = KeysValues(draw(B, 3, 4, 4), draw(B, 3, 4, 5))
        later = KeysValues(draw(B, 3, 7, 4, seed=1), draw(B, 3, 7, 5, seed=1))
        both = first.append(later)
        assert torch.equal(both.keys, torch.cat([first.keys, later.keys], 2))
        assert torch.equal(both.values, torch.cat([first.values, later.values], 2))
        assert both.mask is None


def test_grouped_queries_save_projections_and_not_the_kernel():
    tokens = tokens_of((5, 13))
    cost = {}
    for kv_heads in (6, 2):
        read = read_of(tokens, heads=6, qk_dim=12, v_dim=18, num_kv_heads=kv_heads)
        sizes = Sizes.of(read.read_context(tokens, num_queries=7))
        assert (sizes.kv_dim, sizes.group_size) == (5 * kv_heads, 6 // kv_heads)
        cost[kv_heads] = Dense().cost(sizes, Machine()).flops - 2 * 2 * 65 * tokens.dim * 5 * kv_heads
    assert cost[6] == cost[2] == 2 * 2 * 7 * 65 * 30
