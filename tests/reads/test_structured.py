"""Structured reads: which reads they compute, and reads that only an attention kernel computes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from perceiver_core import masks, positions
from perceiver_core.kernels import chunked, reference, sdpa
from perceiver_core.kernels.grid import cpp_library
from perceiver_core.reads import Factored, Machine, Sizes, Structured, factored, slabs, structured
from tests.reads.cases import images, model_of, read_of, tokens_of


@pytest.mark.refusal
@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kernel": sdpa}, "the kernel sdpa was chosen"),
        ({"kernel": partial(chunked, chunk_size=3)}, "was chosen"),
        ({"kernel": reference}, "the kernel reference was chosen"),
        ({"rotary": positions.Rotary(2)}, "rotary positions rotate the keys"),
        ({"qk_norm": nn.LayerNorm}, "the keys of each head are normalized"),
        ({"num_kv_heads": 1}, "several heads share their keys and values"),
        ({"dropout": 0.5}, "attention weights are dropped in training"),
        ({"mask": masks.Causal()}, "the mask differs between queries"),
    ],
    ids=["sdpa", "chunked", "reference", "rotary", "norm", "grouped", "dropout", "causal"],
)
def test_reads_that_only_a_kernel_computes(options, reason):
    tokens, options = tokens_of((5, 13)), dict(options)
    mask = options.pop("mask", None)
    context = read_of(tokens, **options).read_context(tokens, mask=mask)
    assert reason in Structured().why_not(context)
    assert Factored().why_not(context) == ""
    with pytest.raises(ValueError, match="cannot compute this read"):
        replace(context.source, strategy=Structured()).memory(context.attention)


def test_dropout_of_a_model_in_evaluation_does_not_matter():
    tokens = tokens_of((5, 13))
    assert Structured().why_not(read_of(tokens, dropout=0.5).eval().read_context(tokens)) == ""


def test_its_memory_is_attended_to_by_structure():
    tokens = tokens_of((5, 13))
    memory = Structured().prepare(read_of(tokens).read_context(tokens))
    assert memory.attend_slab is structured.attend_slab
    assert memory.tokens_per_slab == slabs.TOKENS


@pytest.mark.parametrize("strategy", [Structured(), Factored()])
def test_prepare_refuses_what_it_would_ignore(strategy, monkeypatch):
    """For a user's strategy that delegates without asking `why_not`."""
    monkeypatch.setattr(slabs, "TOKENS", 8)
    tokens = tokens_of((5, 13))
    context = read_of(tokens).read_context(tokens, mask=masks.Causal())
    with pytest.raises(ValueError, match="must be the same for all queries"):
        factored.masked(strategy.prepare(read_of(tokens).read_context(tokens)), masks.Causal())
    if isinstance(strategy, Structured):
        with pytest.raises(ValueError, match="must be the same for all queries"):
            strategy.prepare(context)
    with pytest.raises(TypeError, match="needs Tokens; got Tensor"):
        strategy.prepare(read_of(tokens).read_context(tokens.materialize()))


def test_what_is_missing_for_the_compiled_loop(monkeypatch):
    tokens = tokens_of((5, 13))
    context = read_of(tokens).read_context(tokens)
    monkeypatch.setattr(cpp_library, "functions", lambda: {"forward": None})
    assert Structured().missing(context) == ""
    monkeypatch.setattr(cpp_library, "functions", dict)
    assert Structured().missing(context) == "it would need a C++ compiler"


def test_its_cost_grows_with_queries_tokens_and_channels():
    tokens = tokens_of((5, 13))
    sizes, machine = Sizes.of(read_of(tokens).read_context(tokens, num_queries=7)), Machine(start=0.0)
    once = Structured().cost(sizes, machine)
    for more in (
        sizes._replace(num_queries=14),
        sizes._replace(num_tokens=130, axes=(10, 13)),
        sizes._replace(num_channels=4, token_dim=sizes.token_dim + 1),
    ):
        assert all(new > old for new, old in zip(Structured().cost(more, machine), once, strict=True))
    started = Structured().cost(sizes, Machine(start=3e6))
    assert started.seconds == pytest.approx(once.seconds + 3)


@pytest.mark.compile  # traced sizes are tensors, which checked shapes refuse
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:torch.jit.TracerWarning")
def test_a_trace_can_be_saved(tmp_path):
    model, pictures = model_of(Structured()).float().eval(), images().float()
    torch.jit.trace(model, (pictures,), check_trace=False).save(tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(pictures), model(pictures))
