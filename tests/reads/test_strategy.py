"""Strategies of a read give the same result; sizes, costs, and errors of what is no strategy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import CrossAttend, Tokens, explain_reads, masks, positions, reads
from perceiver_core.reads import (
    Auto,
    Cost,
    Dense,
    Factored,
    FactoredKeysValues,
    KeysValues,
    Machine,
    Sizes,
    Strategy,
    Structured,
    slabs,
)
from tests.reads.cases import (
    ALL,
    EXACT,
    GRIDS,
    NORMS,
    OTHERS,
    attention_map,
    images,
    memory_of,
    model_of,
    outcome,
    queries,
    read_of,
    tokens_of,
)


@pytest.mark.parametrize("strategy", OTHERS.values(), ids=OTHERS)
class TestOneResult:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
    def test_over_grids(self, strategy, grid, masked):
        tokens, x = tokens_of(grid, masked=masked), queries()
        read = read_of(tokens)
        expected = outcome(read, x, tokens)
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(outcome(read, x, tokens), expected, **EXACT)

    @pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"out_bias": False}], ids=repr)
    def test_over_norms_and_biases(self, strategy, norm, options):
        tokens, x = tokens_of((5, 13)), queries()
        read = read_of(tokens, norm=norm, **options)
        expected = outcome(read, x, tokens)
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(outcome(read, x, tokens), expected, **EXACT)

    @pytest.mark.parametrize("masked", [False, True])
    def test_grouped_queries_and_norms_of_queries_and_keys(self, strategy, masked, monkeypatch):
        if isinstance(strategy, Structured):
            pytest.skip("it does not compute them")
        monkeypatch.setattr(slabs, "TOKENS", 7)  # many tokens: other reads would be computed in slabs
        tokens, x = tokens_of((5, 13), masked=masked), queries()
        read = read_of(tokens, heads=6, qk_dim=12, v_dim=18, num_kv_heads=2, qk_norm=nn.LayerNorm)
        expected = outcome(read, x, tokens)
        weights = attention_map(read, x, tokens)
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(outcome(read, x, tokens), expected, **EXACT)
        torch.testing.assert_close(attention_map(read, x, tokens), weights, **EXACT)

    def test_queries_that_all_samples_share(self, strategy):
        tokens, x = tokens_of((5, 13), batch=3), queries(batch=1)
        read = read_of(tokens)
        expected = outcome(read, x, tokens)
        assert expected[0].shape[0] == 3
        each = read(x.expand(3, -1, -1), tokens)
        torch.testing.assert_close(each, expected[0], **EXACT)
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(outcome(read, x, tokens), expected, **EXACT)

    def test_one_sample_for_several_batches_of_queries(self, strategy):
        tokens, x = tokens_of((5, 13), batch=1, masked=True), queries(batch=3)
        read = read_of(tokens)
        expected = torch.cat([read(x[i : i + 1], tokens) for i in range(3)])
        torch.testing.assert_close(read(x, tokens), expected, **EXACT)
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(read(x, tokens), expected, **EXACT)

    def test_learned_positions(self, strategy):
        learned = positions.LearnedGrid((5, 13), dim=6).double()
        content, x = torch.randn(2, 5, 13, 3, dtype=torch.float64), queries()

        def gradients(read):
            tokens = Tokens(content, learned.tables((5, 13), like=content))
            return torch.autograd.grad(read(x, tokens).square().sum(), list(learned.parameters()))

        read = read_of(Tokens(content, learned.tables((5, 13), like=content)))
        expected = gradients(read)
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(gradients(read), expected, **EXACT)

    def test_samples_without_valid_tokens(self, strategy):
        tokens = tokens_of((5, 13))
        mask = torch.ones(2, 5, 13, dtype=torch.bool)
        mask[1] = False
        tokens, x = Tokens(tokens.content, tokens.position_tables, mask), queries()
        read = read_of(tokens)
        expected = outcome(read, x, tokens)
        reads.set_strategy(read, strategy)
        actual = outcome(read, x, tokens)
        torch.testing.assert_close(actual, expected, **EXACT)
        assert actual[1]["content"][1].abs().max() == 0

    def test_values_of_masked_tokens_have_no_effect(self, strategy):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens, strategy=strategy)
        expected = outcome(read, x, tokens)
        spoiled = tokens.content.masked_fill(~tokens.mask.unsqueeze(-1), torch.nan)
        actual = outcome(read, x, Tokens(spoiled, tokens.position_tables, tokens.mask))
        torch.testing.assert_close(actual, expected, **EXACT)

    @pytest.mark.parametrize(
        "mask",
        [
            torch.arange(65).expand(2, -1) < 29,
            (torch.arange(65) < 29).reshape(1, 1, 1, 65),
            masks.Padding(torch.arange(65).expand(2, -1) < 29),
            masks.Causal(),
            (torch.arange(7)[:, None] * 5 >= torch.arange(65)).reshape(1, 1, 7, 65),
        ],
        ids=["b n", "1 1 1 n", "padding", "causal", "1 1 q n"],
    )
    def test_masks_of_a_call(self, strategy, mask):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens)
        expected = outcome(read, x, tokens, mask=mask)
        if strategy.why_not(read.read_context(tokens, mask=mask)):
            assert strategy == Structured()
            return
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(outcome(read, x, tokens, mask=mask), expected, **EXACT)

    def test_a_memory_that_several_reads_share(self, strategy):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens)
        other = masks.Window(before=40, after=3)
        expected = read(x, tokens), read(x, tokens, mask=other)
        reads.set_strategy(read, strategy)
        memory = memory_of(read, x, tokens, num_queries=14)
        torch.testing.assert_close((read(x, memory), read(x, memory, mask=other)), expected, **EXACT)

    def test_attention_maps(self, strategy):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens)
        expected = attention_map(read, x, tokens, queries=[0, 3])
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(attention_map(read, x, tokens, queries=[0, 3]), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", [Factored(), Structured()], ids=repr)
def test_half_precision_is_as_accurate_as_a_dense_read(strategy, dtype):
    tokens, x = tokens_of((17, 13)), queries()
    read = read_of(tokens)
    truth = read(x, tokens).detach()
    half, y = copy.deepcopy(read).to(dtype), x.detach().to(dtype)
    rounded = Tokens(tokens.content.to(dtype), tuple(table.to(dtype) for table in tokens.position_tables))

    def error(strategy):
        reads.set_strategy(half, strategy)
        return float((half(y, rounded).detach() - truth).norm() / truth.norm())

    assert error(strategy) < 1.5 * error(Dense())


@pytest.mark.parametrize("strategy", [Factored(), Structured(), Auto()], ids=repr)
def test_autocast(strategy):
    tokens, x = tokens_of((17, 13)), queries()
    read = read_of(tokens, strategy=strategy)
    truth = read(x, tokens).detach()
    single = Tokens(tokens.content.float(), tuple(table.float() for table in tokens.position_tables))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = read.float()(x.detach().float(), single)
    assert (actual.detach() - truth).norm() / truth.norm() < 2e-2


def test_a_model_in_float64_inside_autocast():
    tokens, x = tokens_of((5, 13)), queries()
    read = read_of(tokens)
    expected = read(x, tokens)
    for strategy in ALL:
        reads.set_strategy(read, strategy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(read(x, tokens), expected, **EXACT)


@pytest.mark.parametrize("strategy", [Dense(), Factored(), Structured(), Auto()], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_layer_norms_in_float32_in_a_model_in_bfloat16(strategy, masked):
    tokens, x = tokens_of((17, 13), masked=masked), queries().detach()
    read = read_of(tokens, strategy=strategy)
    truth = read(x, tokens)
    half = copy.deepcopy(read).to(torch.bfloat16)
    for name in ("query_norm", "input_norm", "mlp_norm"):
        setattr(half, name, getattr(read, name).float())
    tables = tuple(table.bfloat16() for table in tokens.position_tables)
    rounded = Tokens(tokens.content.bfloat16(), tables, tokens.mask)
    out = half(x.bfloat16(), rounded)
    assert out.dtype == torch.bfloat16
    assert (out - truth).norm() / truth.norm() < 2e-2
    assert torch.equal(half(x.bfloat16(), memory_of(half, x.bfloat16(), rounded)), out)
    out.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in half.parameters())
    assert half.input_norm.weight.grad.dtype == torch.float32


def test_the_memory_of_each_strategy():
    tokens = tokens_of((5, 13))
    context = read_of(tokens).read_context(tokens)
    assert [type(strategy.prepare(context)) for strategy in (Dense(), Factored(), Structured())] == [
        KeysValues,
        KeysValues,
        FactoredKeysValues,
    ]


@pytest.mark.parametrize("share", [True, False, pc.sharing.all_])
def test_whole_models(share):
    model, pictures = model_of(Dense(), share), images()

    def run():
        out = model(pictures)
        return out.detach(), torch.autograd.grad(out.square().sum(), list(model.parameters()))

    expected = run()
    for strategy in (Factored(), Structured(), Auto()):
        reads.set_strategy(model, strategy)
        torch.testing.assert_close(run(), expected, **EXACT)


class TwiceTheValues:
    """A strategy by a user."""

    def why_not(self, context):
        return ""

    def cost(self, sizes, machine):
        return Cost(0.0, 0.0, 0.0)

    def prepare(self, context):
        memory = Dense().prepare(context)
        return memory._replace(values=2 * memory.values)


def test_a_strategy_by_a_user():
    tokens, x = tokens_of((5, 13)), queries()
    read = read_of(tokens, out_bias=False)
    read.mlp = None
    expected = x + 2 * (read(x, tokens) - x)
    assert isinstance(TwiceTheValues(), Strategy)
    for strategy in (TwiceTheValues(), Auto([Dense(), TwiceTheValues()])):  # its cost is the least
        reads.set_strategy(read, strategy)
        torch.testing.assert_close(read(x, tokens), expected, **EXACT)


def test_a_strategy_is_saved_with_the_model(tmp_path):
    strategy = Auto(strategies=[Factored(), Dense()], machine=Machine(matmul=3.0))
    pc.save(model_of(strategy), tmp_path)
    assert pc.load(tmp_path).encoder.reads[0].strategy == strategy


def test_a_strategy_that_is_set_later_is_not_saved(tmp_path):
    """A loaded model uses the strategy of its constructor."""
    model = model_of()
    reads.set_strategy(model, Dense())
    again = pc.load(pc.save(model, tmp_path))
    assert again.encoder.reads[0].strategy == Auto()
    torch.testing.assert_close(again.double()(images()), model(images()))


@pytest.mark.refusal
@pytest.mark.parametrize("strategy", [Dense, "dense", None], ids=str)
def test_what_is_no_strategy_raises(strategy):
    for use in (
        lambda: reads.set_strategy(model_of(), strategy),
        lambda: Auto(strategies=[strategy]),
        lambda: CrossAttend(8, 8, strategy=strategy),
    ):
        with pytest.raises(TypeError, match=r"(strategy|strategies\[0\]) must be an object such as reads\.Dense\(\)"):
            use()


@pytest.mark.refusal
def test_a_module_without_reads_raises():
    with pytest.raises(ValueError, match="must have reads"):
        reads.set_strategy(nn.Linear(2, 3), Dense())
    with pytest.raises(ValueError, match="must call reads"):
        explain_reads(nn.Linear(2, 3), torch.rand(5, 2))


class TestSizes:
    def test_a_video_with_a_learned_table(self):
        frames, learned = torch.randn(5, 1, 1, 6), torch.randn(1, 7, 3, 6)
        tokens = Tokens(torch.randn(2, 5, 7, 3, 4), position_tables=(frames, learned))
        read = CrossAttend(19, 10)
        assert Sizes.of(read.read_context(tokens)).axes == (5, 21)

    def test_of_tokens_and_of_a_tensor(self):
        tokens = tokens_of((5, 13))
        read = read_of(tokens, heads=6, qk_dim=12, v_dim=18, num_kv_heads=2)
        sizes = Sizes.of(read.read_context(tokens, num_queries=7))
        assert sizes == Sizes(
            batch=2,
            num_tokens=65,
            token_dim=tokens.dim,
            num_channels=3,
            axes=(5, 13),
            num_heads=6,
            kv_dim=10,
            num_queries=7,
            element_size=8,
            device="cpu",
            group_size=3,
        )
        assert sizes.pairs() == 2 * 6 * 7 * 65
        assert sizes.materialized_bytes() == 2 * 65 * (2 * tokens.dim + 10) * 8
        tensor = Sizes.of(read.read_context(tokens.materialize(), num_queries=7))
        assert tensor == sizes._replace(num_channels=tokens.dim, axes=(65,))

    @pytest.mark.parametrize("half", [False, True])
    def test_autocast_sets_the_element_size(self, half):
        tokens = tokens_of((5, 13))
        read = read_of(tokens).float()
        single = Tokens(tokens.content.float(), tokens.position_tables)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            sizes = Sizes.of(read.read_context(single))
        assert (sizes.is_half(), sizes.element_size) == ((True, 2) if half else (False, 4))
