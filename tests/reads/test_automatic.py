"""`Auto`: the choice between strategies by predicted cost, and its decisions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from perceiver_core import Tokens
from perceiver_core.kernels.grid import cpp_library
from perceiver_core.reads import Auto, Decision, Dense, Factored, Machine, Sizes, Structured, automatic
from perceiver_core.reads.machine import MEASURED_CPU
from tests.reads.cases import ALL, EXACT, queries, read_of, tokens_of


def context_of(tokens, num_queries=512):
    return read_of(tokens, qk_dim=128, v_dim=128).read_context(tokens, num_queries=num_queries)


def choice(tokens, strategies=ALL):
    return Auto(strategies).choose(context_of(tokens)).strategy


def test_a_large_image_is_read_by_structure():
    assert choice(tokens_of((113, 127))) == Structured()


def test_a_line_is_not():
    assert choice(tokens_of((9973,))) != Structured()


def test_a_dense_read_that_would_fill_the_memory_is_avoided(monkeypatch):
    tokens = tokens_of((9973,))
    assert choice(tokens) == Dense()
    monkeypatch.setattr(automatic, "MATERIALIZED_BYTES", 2**20)
    automatic._ranked.cache_clear()
    try:
        assert choice(tokens) == Factored()
        assert choice(tokens, [Dense()]) == Dense()
    finally:
        automatic._ranked.cache_clear()


def test_a_tensor_is_read_densely():
    read = read_of(tokens_of((5, 13)))
    context = read.read_context(torch.randn(2, 65, read.input_dim, dtype=torch.float64))
    assert Auto().choose(context).strategy == Dense()


def test_a_strategy_that_is_left_out_is_not_taken():
    assert choice(tokens_of((113, 127)), (Factored(), Dense())) != Structured()


def test_costs_decide():
    context = context_of(tokens_of((113, 127)))
    assert Auto(machine=Machine(pair=1e6)).choose(context).strategy != Structured()
    assert Auto(machine=Machine(attention=1e-9)).choose(context).strategy == Structured()


@pytest.mark.parametrize("machine", [None, Machine(linear=7.0)])
def test_a_decision_has_the_least_cost(machine):
    context = context_of(tokens_of((113, 127)), num_queries=17)
    decision = Auto(machine=machine).choose(context)
    expected = MEASURED_CPU if machine is None else machine
    assert isinstance(decision, Decision)
    assert (decision.sizes, decision.machine) == (Sizes.of(context), expected)
    costs = [strategy.cost(decision.sizes, expected) for strategy in ALL]
    assert decision.cost == decision.strategy.cost(decision.sizes, expected) == min(costs, key=lambda c: c.seconds)
    assert Auto().cost(decision.sizes, expected) == decision.cost


def test_reasons_are_joined_if_no_strategy_can():
    tokens = tokens_of((5, 13))
    read = read_of(tokens)
    dense, given = read.read_context(tokens.materialize()), read.read_context(tokens)
    assert Auto().why_not(dense) == Auto().why_not(given) == ""
    reason = Auto([Structured(), Factored()]).why_not(dense)
    assert reason.count("the input is a tensor") == 2 and "; " in reason
    read.attention.kernel = lambda q, k, v, *, mask: v
    assert Auto([Structured(), Factored()]).why_not(read.read_context(tokens)) == ""


def test_the_input_is_prepared_by_the_chosen_strategy():
    tokens = tokens_of((5, 13))
    context = context_of(tokens)
    auto = Auto(machine=Machine(start=0.0, pair=1e-9, channel=0.0))
    assert auto.choose(context).strategy == Structured()
    assert type(auto.prepare(context)) is type(Structured().prepare(context))


def test_hooks_of_projections_see_all_tokens():
    tokens, seen = tokens_of((113, 127)), []
    read = read_of(tokens, strategy=Auto())
    read.attention.key.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    read(queries(), tokens)
    assert seen == [(2, 113 * 127, 14)]


def test_reads_are_dense_on_devices_that_were_not_measured():
    tokens = tokens_of((113, 127))
    read = read_of(tokens, qk_dim=128, v_dim=128).to("meta")
    away = Tokens(tokens.content.to("meta"), tuple(table.to("meta") for table in tokens.position_tables))
    context = read.read_context(away, num_queries=512)
    assert Auto().choose(context).strategy == Dense()
    assert Auto(strategies=[Structured(), Factored()]).choose(context).strategy == Factored()


@pytest.mark.parametrize(("strategies", "expected"), [(ALL, Factored()), ([Structured()], Structured())])
def test_without_a_compiler_structured_reads_are_the_last_resort(strategies, expected, monkeypatch):
    cheap = Auto(strategies, machine=Machine(pair=1e-9, channel=0.0, start=0.0, linear=1e-3))
    context = context_of(tokens_of((5, 13)))
    assert cheap.choose(context).strategy == Structured()
    monkeypatch.setattr(cpp_library, "functions", dict)
    assert cheap.choose(context).strategy == expected


class UserAttention(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, inputs, *, mask=None):
        return self.inner(x, inputs, mask=mask)


@pytest.mark.parametrize("strategy", [*ALL, Auto()], ids=lambda strategy: type(strategy).__name__)
def test_a_user_defined_attention_needs_no_strategy(strategy):
    tokens, x = tokens_of((5, 13), masked=True), queries()
    read = read_of(tokens)
    expected = read(x, tokens)
    read.attention, read.strategy = UserAttention(read.attention), strategy
    torch.testing.assert_close(read(x, tokens), expected, **EXACT)


@pytest.mark.refusal
def test_a_read_that_no_strategy_can_compute_raises():
    read = read_of(tokens_of((5, 13)), strategy=Auto(strategies=[Structured()]))
    with pytest.raises(
        ValueError, match=r"cannot compute this read: the input is a tensor.*such as reads\.Auto\(\) or reads\.Dense"
    ):
        read(queries(), torch.randn(2, 65, read.input_dim, dtype=torch.float64))


@pytest.mark.refusal
def test_no_strategies_raise():
    with pytest.raises(ValueError, match="strategies must name at least one; got none"):
        Auto(strategies=[])


class NotHashable(Dense):
    __hash__ = None


def test_a_strategy_need_not_be_hashable():
    tokens, x = tokens_of((5, 13)), queries()
    read = read_of(tokens)
    expected = read(x, tokens)
    read.strategy = Auto(strategies=[NotHashable()])
    torch.testing.assert_close(read(x, tokens), expected)
