"""Factored reads: which norms and projections they take apart, and their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from perceiver_core import CrossAttend, Tokens, positions, reads
from perceiver_core.kernels import sdpa
from perceiver_core.reads import Auto, FactoredKeysValues, KeysValues, Machine, Sizes, factored, slabs
from tests.reads.cases import EXACT, memory_of, outcome, queries, read_of, tokens_of
from tests.reads.factored_cases import GRID, TABLES, B, C, H, P, Q, draw

each_strategy = pytest.mark.parametrize("strategy", [reads.Structured(), reads.Factored()], ids=repr)
MODULES = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm, eps": lambda width: nn.LayerNorm(width, eps=0.3),
    "LayerNorm, no bias": lambda width: nn.LayerNorm(width, bias=False),
    "LayerNorm, nothing learned": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "RMSNorm": nn.RMSNorm,
    "RMSNorm, eps": lambda width: nn.RMSNorm(width, eps=0.3),
    "RMSNorm, nothing learned": lambda width: nn.RMSNorm(width, eps=0.3, elementwise_affine=False),
    "RMSNorm, neither": lambda width: nn.RMSNorm(width, elementwise_affine=False),
    "Identity": lambda width: nn.Identity(),
}


@each_strategy
@pytest.mark.parametrize("norm", MODULES.values(), ids=MODULES.keys())
def test_norms(norm: Callable[[int], nn.Module], strategy: reads.Strategy) -> None:
    """With any norm, a cross-attend gives the outputs and gradients of dense tokens."""
    torch.manual_seed(0)
    block = CrossAttend(14, C + P, num_heads=H, norm=norm).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    content, tables = (1e-3 * draw(B, *GRID, C)).requires_grad_(), [1e-3 * x for x in TABLES["overlapping"]]

    def result(strategy: reads.Strategy) -> list[Tensor]:
        reads.set_strategy(block, strategy)
        out = block(draw(B, Q, 14), Tokens(content, tuple(tables)))
        return [out, *torch.autograd.grad(out.square().sum(), [content, *block.parameters()])]

    torch.testing.assert_close(result(strategy), result(reads.Dense()), rtol=1e-8, atol=1e-9)


@each_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_default_eps_of_rms_norm_in_half_precision(dtype: torch.dtype, strategy: reads.Strategy) -> None:
    """The content is so small that eps matters: the eps of the half-precision dtype would scale it down."""
    torch.manual_seed(0)
    block = CrossAttend(14, C, num_heads=1, norm=nn.RMSNorm, residual=False, mlp=None).to(dtype)
    x, tokens = draw(B, Q, 14).to(dtype), Tokens(1e-2 * draw(B, *GRID, C).to(dtype))
    reads.set_strategy(block, reads.Dense())
    expected = block(x, tokens)
    reads.set_strategy(block, strategy)
    torch.testing.assert_close(block(x, tokens), expected, rtol=0.0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda read: setattr(read, "input_norm", nn.Sequential()), "the norm is a Sequential"),
        (lambda read: setattr(read.attention, "key", nn.Sequential(read.attention.key)), "not a plain nn.Linear"),
        (lambda read: read.attention.value.register_forward_hook(lambda *_: None), "has a hook, which expects"),
        (lambda read: read.input_norm.register_forward_pre_hook(lambda *_: None), "has a hook, which expects"),
        (
            lambda read: read.attention.key.register_full_backward_pre_hook(lambda *_: None),
            "has a hook, which expects",
        ),
        (lambda read: setattr(read.attention.key, "forward", read.attention.key.forward), "was replaced"),
        (lambda read: nn.utils.parametrizations.weight_norm(read.attention.key), "not a plain nn.Linear"),
    ],
    ids=["norm", "projection", "hook", "pre-hook", "backward hook", "patched", "parametrization"],
)
def test_modules_that_cannot_be_taken_apart(change, reason):
    tokens, x = tokens_of((5, 13)), queries()
    read = read_of(tokens)
    change(read)
    assert reason in reads.Factored().why_not(read.read_context(tokens))
    assert reason in reads.Structured().why_not(read.read_context(tokens))
    expected = read(x, tokens)  # dense
    read.strategy = Auto()
    torch.testing.assert_close(read(x, tokens), expected, **EXACT)


class Quantized(nn.Parameter):
    """A weight that is no plain tensor."""


def test_weights_that_are_no_plain_tensors():
    tokens = tokens_of((5, 13))
    read = read_of(tokens)
    read.attention.key.weight = Quantized(read.attention.key.weight.data)
    read.attention.key.weight.__class__ = Quantized
    reason = reads.Factored().why_not(read.read_context(tokens))
    assert reason == "a weight of the norm or of a projection is a Quantized, not a plain tensor"


@pytest.mark.refusal
@each_strategy
def test_a_forced_strategy_that_cannot_compute_a_read_raises(strategy):
    read = read_of(tokens_of((5, 13)), strategy=strategy)
    message = r"cannot compute this read: the input is a tensor.*Choose another strategy, such as reads\.Auto\(\)"
    with pytest.raises(ValueError, match=message):
        read(queries(), torch.randn(2, 65, read.input_dim, dtype=torch.float64))


def test_many_tokens_are_read_in_slabs(monkeypatch):
    tokens, x = tokens_of((5, 13), masked=True), queries()
    read = read_of(tokens)
    expected = outcome(read, x, tokens)
    monkeypatch.setattr(slabs, "TOKENS", 31)
    for strategy in (reads.Factored(), reads.Structured()):
        reads.set_strategy(read, strategy)
        assert isinstance(memory_of(read, x, tokens), FactoredKeysValues)
        torch.testing.assert_close(outcome(read, x, tokens), expected, **EXACT)


@pytest.mark.parametrize(("constant", "value"), [("TOKENS", 31), ("FORMED_NUMBERS", 31 * (14 + 22))])
def test_the_size_of_a_slab(constant, value, monkeypatch):
    tokens = tokens_of((5, 13))
    context = read_of(tokens).read_context(tokens)
    assert isinstance(reads.Factored().prepare(context), KeysValues)
    monkeypatch.setattr(slabs, constant, value)
    memory = reads.Factored().prepare(context)
    assert isinstance(memory, FactoredKeysValues)
    assert (memory.tokens_per_slab, memory.attend_slab) == (31, factored.attend_slab)


@pytest.mark.parametrize(
    "options",
    [{"kernel": sdpa}, {"rotary": positions.Rotary(2)}, {"num_kv_heads": 1}],
    ids=["kernel", "rotary", "grouped"],
)
def test_keys_and_values_are_formed_for_a_kernel(options, monkeypatch):
    monkeypatch.setattr(slabs, "TOKENS", 31)
    tokens, x = tokens_of((5, 13), masked=True), queries()
    read = read_of(tokens, **options)
    expected = memory_of(read, x, tokens)
    reads.set_strategy(read, reads.Factored())
    actual = memory_of(read, x, tokens)
    assert isinstance(actual, KeysValues)
    torch.testing.assert_close(actual.keys, expected.keys, **EXACT)
    valid = tokens.flat_mask()[:, None, :, None]
    torch.testing.assert_close(actual.values * valid, expected.values * valid, **EXACT)


def test_its_cost_is_that_of_content_and_tables():
    """Of 65 tokens per sample, 3 channels are projected; of 5 + 13 positions, 10 features, once per batch."""
    tokens = tokens_of((5, 13))
    sizes = Sizes.of(read_of(tokens).read_context(tokens, num_queries=7))
    assert tokens.dim == 3 + 10
    cost = reads.Factored().cost(sizes, Machine())
    assert cost.flops == 2 * 36 * (2 * 65 * 3 + 18 * 10) + 2 * 2 * 7 * 65 * 36
    assert reads.Factored().cost(sizes, Machine(start=3e6)).seconds > 3
