"""MultiHeadAttention against its formula, for all widths, kernels, masks and positions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import MultiHeadAttention, masks
from perceiver_core.kernels import chunked, reference, sdpa
from perceiver_core.positions import Rotary
from perceiver_core.reads import AttentionCapture, KeysValues, KeysValuesCache, SharedMemory
from perceiver_core.reads.dense import project, split_heads

BATCH, QUERIES, TOKENS, DIM, INPUT_DIM = 2, 5, 11, 14, 13
EXACT = {"rtol": 0, "atol": 1e-12}  # float64


def by_formula(attention, x, tokens, allowed=None):
    """softmax(q k^T / sqrt(d)) v, head by head, projected back."""
    heads = attention.num_heads
    q = attention.query(x).unflatten(-1, (heads, -1))
    k = attention.key(tokens).unflatten(-1, (heads, -1))
    v = attention.value(tokens).unflatten(-1, (heads, -1))
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    read = torch.einsum("bhmn,bnhe->bmhe", scores.softmax(-1), v)
    return attention.output(read.flatten(2))


def randomized(module):
    """Biases start at zero, where a test could not detect them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double()


def arrays(*, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, QUERIES, DIM, generator=generator, dtype=torch.float64)
    tokens = torch.randn(BATCH, TOKENS, INPUT_DIM, generator=generator, dtype=torch.float64)
    return x, tokens


def user_kernel(q, k, v, *, mask):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2]), -math.inf)
    return scores.softmax(-1) @ v


def attention_map(attention, x, inputs, *, mask=None, queries=None):
    capture = AttentionCapture(queries=queries)
    attention(x, inputs, mask=mask, capture=capture)
    return capture.result()


WIDTHS = [
    {"num_heads": 1},
    {"num_heads": 13},
    {"num_heads": 3, "qk_dim": 21},
    {"num_heads": 3, "qk_dim": 21, "v_dim": 33},
    {"num_heads": 1, "v_dim": 7},
    {"num_heads": 2, "qk_dim": 34, "v_dim": 6, "out_dim": 17},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_bias", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_it_equals_the_formula(widths, bias, out_bias):
    attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, bias=bias, out_bias=out_bias, **widths))
    x, tokens = arrays()
    out = attention(x, tokens)
    assert out.shape == (BATCH, QUERIES, widths.get("out_dim", DIM))
    torch.testing.assert_close(out, by_formula(attention, x, tokens), **EXACT)
    assert [(layer.bias is not None) for layer in (attention.query, attention.key, attention.value)] == [bias] * 3
    assert (attention.output.bias is not None) == out_bias


def test_widths_follow_the_input_by_default():
    attention = MultiHeadAttention(DIM, INPUT_DIM, num_heads=1)
    assert attention.query.weight.shape == (INPUT_DIM, DIM)
    assert attention.key.weight.shape == attention.value.weight.shape == (INPUT_DIM, INPUT_DIM)
    assert attention.output.weight.shape == (DIM, INPUT_DIM)
    assert MultiHeadAttention(DIM, num_heads=2).input_dim == DIM


@pytest.mark.parametrize(
    "kernel",
    [reference, sdpa, partial(chunked, chunk_size=5), user_kernel],
    ids=["reference", "sdpa", "chunked", "user"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_are_interchangeable(kernel, masked):
    attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=3, qk_dim=21, v_dim=15, kernel=kernel))
    x, tokens = arrays()
    x.requires_grad_()
    tokens.requires_grad_()
    allowed = torch.rand(BATCH, 1, QUERIES, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[..., 3] = True
    mask = allowed if masked else None
    wrt = [x, tokens, *attention.parameters()]
    out = attention(x, tokens, mask=mask)
    expected = by_formula(attention, x, tokens, mask)
    torch.testing.assert_close(out, expected, **EXACT)
    gradients = torch.autograd.grad(out.square().sum(), wrt)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), wrt), rtol=1e-10, atol=1e-10)


def test_masks_of_the_input_and_of_the_call_are_combined():
    attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=1))
    x, tokens = arrays()
    present = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    present[:, 7:] = False
    reach = masks.Window(before=10, after=-5)  # positions count from the end
    memory = project(attention, tokens)._replace(mask=masks.Padding(present))
    allowed = present[:, None, None] & masks.materialize(reach, queries=QUERIES, keys=TOKENS)
    torch.testing.assert_close(attention(x, memory, mask=reach), by_formula(attention, x, tokens, allowed), **EXACT)


def test_keys_and_values_can_be_reused():
    attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=1))
    x, tokens = arrays()
    other, _ = arrays(seed=1)
    memory = project(attention, tokens)
    assert isinstance(memory, KeysValues)
    for queries in (x, other):
        torch.testing.assert_close(attention(queries, memory), by_formula(attention, queries, tokens), **EXACT)


def test_the_attention_map_has_the_weights_of_the_output():
    attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=3, qk_dim=21, v_dim=15))
    x, tokens = arrays()
    present = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.7
    memory = project(attention, tokens)._replace(mask=masks.Padding(present))
    weights = attention_map(attention, x, memory)
    averaged = torch.einsum("bhmn,bhne->bmhe", weights, memory.values).flatten(2)
    torch.testing.assert_close(attention.output(averaged), attention(x, memory), **EXACT)
    chosen = attention_map(attention, x, memory, queries=[4, 1])
    torch.testing.assert_close(chosen, weights[:, :, [4, 1]], **EXACT)
    q = split_heads(attention.query(x), 3)
    torch.testing.assert_close(memory.attention_map(q, attention.kernel), weights, **EXACT)
    torch.testing.assert_close(attention_map(attention, x, tokens, mask=present), weights, **EXACT)
    assert weights.masked_select(~present[:, None, None]).eq(0).all()


class TestGroupedQueries:
    SIZES = ((6, 2), (6, 1), (6, 6), (4, 2))

    def pair(self, heads, kv_heads, **options):
        """Returns attention with grouped queries, and its equivalent with one key and value head per query head."""
        grouped = randomized(
            MultiHeadAttention(DIM, INPUT_DIM, num_heads=heads, num_kv_heads=kv_heads, qk_dim=24, v_dim=36, **options)
        )
        alone = MultiHeadAttention(DIM, INPUT_DIM, num_heads=heads, qk_dim=24, v_dim=36, **options).double()
        state = grouped.state_dict()
        for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
            each = state[name].unflatten(0, (kv_heads, -1))
            state[name] = each.repeat_interleave(heads // kv_heads, 0).flatten(0, 1)
        alone.load_state_dict(state)
        return grouped, alone

    @pytest.mark.parametrize("kernel", [reference, sdpa, partial(chunked, chunk_size=5), user_kernel])
    @pytest.mark.parametrize("heads, kv_heads", SIZES)
    def test_heads_of_a_group_share_keys_and_values(self, heads, kv_heads, kernel):
        grouped, alone = self.pair(heads, kv_heads, kernel=kernel)
        x, tokens = (each.requires_grad_() for each in arrays())
        allowed = torch.rand(BATCH, heads, QUERIES, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
        allowed[..., 3] = True
        memory = project(grouped, tokens)
        assert memory.keys.shape == (BATCH, kv_heads, TOKENS, 24 // heads)
        assert memory.values.shape == (BATCH, kv_heads, TOKENS, 36 // heads)
        outs = grouped(x, memory, mask=allowed), alone(x, tokens, mask=allowed)
        torch.testing.assert_close(*outs, **EXACT)
        gradients = [torch.autograd.grad(out.square().sum(), [x, tokens]) for out in outs]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
        maps = [attention_map(each, x, tokens, queries=[4, 1]) for each in (grouped, alone)]
        assert maps[0].shape == (BATCH, heads, 2, TOKENS)
        torch.testing.assert_close(*maps, **EXACT)

    @pytest.mark.parametrize("heads, kv_heads", SIZES)
    def test_queries_with_a_batch_of_one_broadcast(self, heads, kv_heads):
        grouped, alone = self.pair(heads, kv_heads, rotary=Rotary(4))
        x, tokens = arrays()
        for some, inputs in ((x[:1], tokens), (x, tokens[:1])):
            outs = [each(some, inputs) for each in (grouped, alone)]
            torch.testing.assert_close(*outs, **EXACT)

    @pytest.mark.refusal
    def test_invalid_head_counts_raise(self):
        with pytest.raises(ValueError, match="num_kv_heads must divide num_heads; got num_kv_heads=4, num_heads=6"):
            MultiHeadAttention(DIM, num_heads=6, num_kv_heads=4, qk_dim=12)
        with pytest.raises(ValueError, match="kv_heads must be a whole number of at least 1; got 0"):
            MultiHeadAttention(DIM, num_heads=7, num_kv_heads=0)


def test_queries_and_keys_are_normalized_per_head_before_rotation():
    attention = randomized(
        MultiHeadAttention(DIM, INPUT_DIM, num_heads=3, qk_dim=18, qk_norm=nn.LayerNorm, rotary=Rotary(4))
    )
    x, tokens = arrays()
    q, k = (
        attention.rotary(F.layer_norm(made.unflatten(-1, (3, 6)).transpose(1, 2), (6,), norm.weight, norm.bias))
        for made, norm in ((attention.query(x), attention.query_norm), (attention.key(tokens), attention.key_norm))
    )
    memory = project(attention, tokens)
    torch.testing.assert_close(memory.keys, k, **EXACT)
    expected = attention.output((reference(q, k, memory.values)).transpose(1, 2).flatten(2))
    for inputs in (memory, tokens):
        torch.testing.assert_close(attention(x, inputs), expected, **EXACT)


class TestRotary:
    def logs(self, attention, queries, tokens):
        """Log weights: the scores up to a constant per query."""
        return attention_map(attention, queries, tokens).log()

    def attention(self, dim=6):
        torch.manual_seed(0)
        return randomized(MultiHeadAttention(DIM, num_heads=2, qk_dim=22, rotary=Rotary(dim)))

    def test_scores_of_equal_tokens_depend_on_their_distance_only(self):
        one = arrays()[0][:, :1]
        logs = self.logs(self.attention(), one.expand(-1, TOKENS, -1), one.expand(-1, TOKENS, -1))
        scores = logs - logs.diagonal(dim1=-2, dim2=-1)[..., None]  # against the score at distance 0
        for distance in range(1 - TOKENS, TOKENS):
            along = scores.diagonal(distance, dim1=-2, dim2=-1)
            torch.testing.assert_close(along, along[..., :1].expand_as(along), **EXACT)
        assert (scores.diagonal(1, dim1=-2, dim2=-1) - scores.diagonal(4, dim1=-2, dim2=-1)[..., :1]).abs().min() > 1e-4

    def test_last_queries_have_the_right_distance_to_all_keys(self):
        attention = self.attention()
        tokens = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
        whole = self.logs(attention, tokens, tokens)
        torch.testing.assert_close(self.logs(attention, tokens[:, -3:], tokens), whole[:, :, -3:], **EXACT)

    def test_values_are_not_rotated(self):
        attention, (_, _) = self.attention(), arrays()
        tokens = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
        values = attention.value(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
        torch.testing.assert_close(project(attention, tokens).values, values, **EXACT)


class TestDropout:
    def test_the_kernel_receives_dropout_in_training_only(self):
        given = []

        def kernel(q, k, v, *, mask, dropout=0.0):
            given.append(dropout)
            return reference(q, k, v, mask=mask)

        attention = MultiHeadAttention(DIM, num_heads=2, dropout=0.25, kernel=kernel)
        x = torch.randn(BATCH, TOKENS, DIM)
        for mode in (True, False, True):
            attention.train(mode)(x, x)
        assert given == [0.25, 0.0, 0.25]

    def test_weights_are_dropped_and_rescaled(self):
        attention = randomized(MultiHeadAttention(DIM, num_heads=1, dropout=0.5, kernel=reference))
        x = torch.randn(1, 101, DIM, dtype=torch.float64)
        torch.manual_seed(0)
        dropped = attention(x, x)
        torch.manual_seed(0)
        weights = F.dropout(attention_map(attention.eval(), x, x), 0.5)
        expected = attention.output((weights @ project(attention, x).values)[:, 0])
        torch.testing.assert_close(dropped, expected, **EXACT)

    @pytest.mark.refusal
    def test_a_kernel_without_dropout_raises(self):
        with pytest.raises(ValueError, match=r"dropout=0\.1 needs a kernel that takes `dropout`; user_kernel does not"):
            MultiHeadAttention(DIM, num_heads=2, dropout=0.1, kernel=user_kernel)
        with pytest.raises(ValueError, match="Use kernel=sdpa, or drop from the residual instead"):
            MultiHeadAttention(DIM, num_heads=2, dropout=0.1, kernel=partial(chunked, chunk_size=5))
        MultiHeadAttention(DIM, num_heads=2, dropout=0.1, kernel=lambda q, k, v, **options: v)


def test_a_kernel_without_a_signature_raises() -> None:
    with pytest.raises(ValueError, match=r"kernel must be a function \(q, k, v, \*, mask\); wrap"):
        pc.MultiHeadAttention(14, num_heads=2, kernel=nn.functional.scaled_dot_product_attention)


class TestMemories:
    def test_self_attention_is_the_default(self):
        attention = randomized(MultiHeadAttention(DIM, num_heads=2, rotary=Rotary(4)))
        x, _ = arrays()
        torch.testing.assert_close(attention(x), attention(x, x), **EXACT)

    @pytest.mark.parametrize("kv_heads", [6, 2])
    def test_a_growing_cache_gives_the_same_output(self, kv_heads):
        attention = randomized(
            MultiHeadAttention(DIM, num_heads=6, num_kv_heads=kv_heads, qk_dim=24, v_dim=36, rotary=Rotary(4))
        )
        x, cache = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64), KeysValuesCache()
        places = torch.arange(TOKENS)
        parts = [
            attention(x[:, part], mask=masks.Causal(), positions=places[part], cache=cache)
            for part in (slice(0, 4), slice(4, 5), slice(5, TOKENS))
        ]
        whole = attention(x, mask=masks.Causal(), positions=places)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
        assert cache.memory.keys.shape == (BATCH, kv_heads, TOKENS, 4)
        assert cache.memory.values.shape == (BATCH, kv_heads, TOKENS, 6)

    def test_the_mask_of_a_call_covers_all_cached_keys(self):
        attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=1))
        x, tokens = arrays()
        present = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.6
        cache = KeysValuesCache()
        attention(x, tokens[:, :4], cache=cache)
        out = attention(x, tokens[:, 4:], mask=present, cache=cache)
        torch.testing.assert_close(out, by_formula(attention, x, tokens, present[:, None, None]), **EXACT)

    def test_a_shared_memory_is_that_of_the_first_call(self):
        attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=1))
        x, tokens = arrays()
        _, others = arrays(seed=1)
        cache = SharedMemory()
        for inputs in (tokens, others):
            out = attention(x, inputs, cache=cache)
            torch.testing.assert_close(out, by_formula(attention, x, inputs), **EXACT)
        torch.testing.assert_close(attention(x, cache.memory), by_formula(attention, x, tokens), **EXACT)

    def test_captured_weights_leave_the_output_unchanged(self):
        attention = randomized(MultiHeadAttention(DIM, INPUT_DIM, num_heads=13, kernel=user_kernel))
        x, tokens = arrays()
        capture = AttentionCapture()
        assert torch.equal(attention(x, tokens, capture=capture), attention(x, tokens))
        k = attention.key(tokens).unflatten(-1, (13, -1)).transpose(1, 2)
        q = attention.query(x).unflatten(-1, (13, -1)).transpose(1, 2)
        torch.testing.assert_close(capture.result(), (q @ k.mT).softmax(-1), **EXACT)
