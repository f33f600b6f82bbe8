"""Reports of reads: the strategy that each takes, its cost and the reasons."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import perceiver_core as pc
from perceiver_core import explain_reads, positions
from perceiver_core.kernels import sdpa
from perceiver_core.kernels.grid import cpp_library
from perceiver_core.reads import Auto, Dense, Factored, Structured
from tests.reads.cases import images, model_of


def test_reads_that_share_a_memory_are_one():
    first, rest = explain_reads(model_of(), images())
    assert (first.read, first.sizes.num_queries) == ("encoder.reads.0", 11)
    assert (rest.read, rest.sizes.num_queries) == ("encoder.reads.1", 22)
    assert first.sizes.axes == (19, 23)
    sizes = first.sizes
    assert (sizes.batch, sizes.num_tokens, sizes.num_channels, sizes.token_dim) == (2, 437, 3, 17)


def test_reads_of_encoder_and_decoder():
    model = pc.PerceiverIO(
        torch.nn.Identity(),
        pc.Encoder(10, num_latents=7, dim=14, num_reads=3, depth=1, num_heads=2, share=False),
        pc.queries.Learned(5, dim=12),
        pc.Decoder(14, query_dim=12, out_dim=3),
    )
    reads = explain_reads(model, torch.randn(2, 11, 10))
    names = [f"encoder.reads.{i}" for i in range(3)] + ["decoder.cross_attention"]
    assert [read.read for read in reads] == names
    assert [read.sizes.num_queries for read in reads] == [7, 7, 7, 5]
    assert [read.sizes.num_tokens for read in reads] == [11, 11, 11, 7]


@pytest.mark.parametrize("strategy", [Dense(), Factored(), Structured()], ids=repr)
def test_a_forced_strategy(strategy):
    model = model_of(strategy)
    [read, _] = explain_reads(model, images())
    assert read.strategy == strategy
    assert read.why.startswith("forced; ")
    assert model.encoder.reads[0].strategy == strategy


def test_the_reason_why_a_strategy_cannot_compute_a_read():
    model = model_of()
    model.encoder.reads[0].attention.kernel = sdpa
    [read, _] = explain_reads(model, images())
    assert "Structured cannot: the kernel sdpa was chosen" in read.why


def test_strategies_that_are_not_allowed():
    [read, _] = explain_reads(model_of(Auto(strategies=[Dense()])), images())
    assert read.strategy == Dense()
    assert "(not allowed)" in read.why


def test_the_reason_why_a_structured_read_is_slow(monkeypatch):
    monkeypatch.setattr(cpp_library, "functions", dict)
    [read, _] = explain_reads(model_of(), images())
    assert read.strategy != Structured()
    assert "Structured is slow here: it would need a C++ compiler" in read.why
    [read, _] = explain_reads(model_of().to("meta"), images().to("meta"))
    assert read.strategy == Dense()
    assert "Structured is slow here: there is no compiled loop for meta" in read.why


def test_the_model_and_the_default_generator_are_unchanged():
    model = model_of().train()
    model.adapter = pc.adapters.Image(
        3,
        positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=19),
        stem=partial(pc.adapters.ConvStem, dim=3),
    ).double()
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explain_reads(model, torch.rand(2, 3, 57, 59, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(module.training for module in model.modules())
    assert model.encoder.reads[0].strategy == Auto()


@pytest.mark.refusal
def test_a_failure_leaves_the_model_unchanged():
    model = model_of()
    with pytest.raises(ValueError, match="channels"):
        explain_reads(model, torch.rand(2, 5, 19, 23, dtype=torch.float64))
    assert model.encoder.reads[0].strategy == Auto()
    assert len(explain_reads(model, images())) == 2  # what was recorded before the failure is forgotten


def test_the_table():
    text = str(explain_reads(model_of(), images()))
    head, first, second = text.splitlines()
    assert head.split() == ["read", "queries", "tokens", "strategy", "GFLOP", "MB", "ms", "why"]
    assert first.startswith("encoder.reads.0  11")
    assert "2 x 19 x 23 x (3 + 14)" in first
    assert second.startswith("encoder.reads.1  22")


def test_flops_of_a_dense_read():
    """Two projections of 437 tokens 17 wide to 17 each, and 11 queries against them, for 2 samples."""
    [read, _] = explain_reads(model_of(Dense()), images())
    assert read.cost.flops == 2 * 2 * 437 * 17 * 34 + 2 * 2 * 437 * 11 * 34


@pytest.mark.compile
def test_a_compiled_model_is_explained_as_it_runs_in_eager_mode():
    model = model_of()
    assert explain_reads(torch.compile(model), images()) == explain_reads(model, images())


def test_the_read_of_a_decoder_is_not_advised_to_take_tokens() -> None:
    queries = {"a": torch.randn(2, 3, 6), "b": torch.randn(4, 6)}
    [read] = pc.explain_reads(pc.Decoder(12, query_dim=6), torch.randn(2, 5, 12), queries)
    assert read.read == "cross_attention" and "give Tokens" not in read.why
