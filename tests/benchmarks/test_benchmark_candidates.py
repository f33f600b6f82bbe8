"""The candidates of every benchmark agree, at toy size, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import attention, choice, comparison, generation, models, read, report, scaling
from benchmarks.comparison import Setting

SETTING = Setting(toy=True, device="cpu")
COMPILED = ("PyTorch flash, compiled", "absorbed, compiled", "dense, compiled", "structured, compiled")


def agree(these, names):
    """Assert that candidates agree, on the CPU, and that their work is counted."""
    state = these.setup("cpu")
    calls = {name: partial(these.candidates[name].call, state) for name in names}
    assert comparison.faults(calls, these.candidates, SETTING) == {}
    assert these.work(state).flops > 0


@pytest.mark.parametrize(
    "these", list(attention.comparisons("cuda", toy=True)), ids=lambda these: these.sizes["direction"]
)
def test_attention_agrees_whatever_the_kernel(these):
    agree(these, [name for name in these.candidates if name not in ("PyTorch cuDNN", "PyTorch efficient")])


def test_attention_to_a_grid_agrees_with_a_structured_read():
    for these in attention.comparisons("cpu", toy=True):
        assert list(these.candidates)[-1] == "structured"
        agree(these, these.candidates)


def test_only_valid_keys_are_work():
    ragged = attention.setup(attention.TOY["cuda"][1], "cpu")
    whole, part = (attention._work(1, each) for each in (ragged._replace(valid=None), ragged))
    assert part.flops / whole.flops == pytest.approx(ragged.valid.float().mean().item())
    assert ragged.valid.any(1).all() and not ragged.valid.all()


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_reads_agree_whatever_the_method(platform):
    for these in read.comparisons(platform, toy=True):
        agree(these, [name for name in these.candidates if not name.endswith("compiled")])


@pytest.mark.parametrize("head_dim", [7, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", list(read.DIRECTIONS))
def test_reads_with_absorbed_projections_and_padded_heads_agree(head_dim, dtype, direction):
    sizes = read.TINY._replace(head_dim=head_dim, batch=2, dtype=dtype)
    methods = {
        "dense": partial(read.dense, read.einsum),
        "padded": partial(read.dense, partial(read.fused, "MATH"), multiple=8),
        "absorbed": partial(read.absorbed, read.einsum),
        "absorbed and padded": partial(read.absorbed, read.einsum, multiple=8),
        "absorbed and fused": partial(read.absorbed, partial(read.fused, "FLASH_ATTENTION"), multiple=8),
    }
    agree(read.comparison(sizes, direction, methods), methods)
    layer = read.setup(sizes, "cpu")[0].attention.key
    weight, bias = read.padded(layer, sizes.num_heads, 8)
    assert weight.shape == (sizes.num_heads * 8, layer.in_features) and bias.shape == (sizes.num_heads * 8,)


def test_reads_with_absorbed_projections_form_no_keys():
    sizes = read.TINY._replace(num_heads=1)
    state = read.setup(sizes, "meta")
    dense, absorbed = (
        comparison.count_flops(read.forward, partial(method, read.einsum), state)
        for method in (read.dense, read.absorbed)
    )
    keys_and_values = 4 * math.prod(sizes.grid) * state[2].dim * sizes.head_dim
    scores = 4 * math.prod(sizes.grid) * sizes.num_latents
    more = scores * (state[2].dim - sizes.head_dim) + 4 * sizes.num_latents * state[2].dim * sizes.head_dim
    assert absorbed == dense - keys_and_values + more


def test_on_a_gpu_no_ratio_refers_to_the_unfused_formula():
    for benchmark in (read, attention):
        assert next(iter(benchmark.METHODS["cuda"])).startswith("PyTorch efficient")


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_reads_agree():
    agree(next(iter(read.comparisons("cuda", toy=True))), ["einsum", *COMPILED])


@pytest.mark.parametrize("entry", models.entries("cpu", toy=True), ids=lambda entry: entry.name)
def test_models_of_other_libraries_agree_with_ours(entry):
    pytest.importorskip(entry.library)
    for task in entry.tasks:
        agree(models.comparison(entry, task), entry.candidates)


@pytest.mark.parametrize("entry", models.entries("cuda", toy=True), ids=lambda entry: entry.name)
def test_models_under_autocast_agree(entry):
    pytest.importorskip(entry.library)
    agree(models.comparison(entry, "training"), [n for n in entry.candidates if not n.endswith("compiled")])


def test_models_are_in_float32_at_the_smaller_batch_only():
    entries = models.entries("cuda", toy=False)
    small, large = ([entry for entry in entries if entry.shape[0] == batch] for batch in models.BATCHES_ON_CUDA)
    assert all(entry.candidates[0] in ("ours", "perceiver-pytorch", "transformers") for entry in small)
    assert all(models.AUTOCAST in name for entry in large for name in entry.candidates)
    assert all("ours, autocast, compiled" in entry.candidates for entry in (*small, *large))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_library_that_is_missing_is_left_out_and_named(monkeypatch, platform):
    monkeypatch.setattr(Setting, "platform", platform)
    monkeypatch.setattr(models, "compare_all", lambda these, setting: iter(()))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    found = list(models.run(SETTING))
    assert "transformers Fourier classifier: left out, transformers is not installed" in found


def test_generation_agrees_with_and_without_a_cache():
    [these] = map(generation.comparison, generation.TOY)
    agree(these, these.candidates)


def test_the_loss_by_the_choice_is_relative_to_the_fastest_strategy(monkeypatch):
    times = {"Dense": 1.0, "Factored": 4.0, "Structured": 2.0}

    def measured(these, setting):
        return [{"candidate": name, "median ms": times[name], "peak MB": 1.0} for name in these[0].candidates]

    monkeypatch.setattr(choice, "compare_all", measured)
    *rows, note = choice.run(SETTING)
    [chosen] = [row["candidate"] for row in rows if row["chosen"]]
    assert all(row["predicted ms"] > 0 for row in rows)
    expected = f"the chosen strategy took {times[chosen]:.2f} times the time of the fastest on average"
    assert note.startswith(expected)


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 1.7])
def test_the_fit_finds_the_power_of_a_power_law(power):
    sizes = [10, 30, 100, 300, 1000]
    assert scaling.exponent(sizes, [0.3 * size**power for size in sizes]) == pytest.approx((power, 0.3))


def test_the_fit_is_by_the_larger_sizes():
    sizes = [10, 100, 1000, 10_000, 100_000]
    assert scaling.exponent(sizes, [5.0, 5.0, 1000.0, 10_000.0, 100_000.0])[0] == pytest.approx(1.0)
    assert all(math.isnan(scaling.exponent(sizes, values)[0]) for values in ([5.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5))


def test_a_candidate_that_would_need_too_much_is_left_out_and_named(monkeypatch):
    def measured(these, setting):
        for each in these:
            tokens = math.prod(map(int, each.sizes["grid"].split(" x ")))
            for name in each.candidates:
                memory = tokens * (1.0 if name == "einsum" else 1e-3)
                yield {"candidate": name, "median ms": tokens * (1.0 if name == "sdpa" else 1e-3), "peak MB": memory}

    monkeypatch.setattr(scaling, "compare_all", measured)
    found = list(scaling.run(SETTING))
    sizes = {
        name: [
            row["size"]
            for row in found
            if not isinstance(row, str) and row["candidate"] == name and row["along"] == "tokens"
        ]
        for name in ("einsum", "sdpa", "library")
    }
    assert sizes == {"einsum": [1000, 3000], "sdpa": [1000, 3000], "library": [1000, 3000, 10_000]}
    assert "tokens: einsum, left out at 10,000, where it would need 10.0 GB and 0.0 s" in found
    assert "tokens: sdpa, left out at 10,000, where it would need 0.0 GB and 10.0 s" in found
    assert "tokens: library, time grows as n^1.00, memory grows as n^1.00" in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["read", "attention", "models"])
def test_on_a_gpu_every_candidate_that_is_not_refused_is_measured(name):
    found = command_line.BENCHMARKS[name].module.run(Setting(toy=True, device="cuda"))
    rows = [row for row in found if not isinstance(row, str)]
    assert report.failures(rows) == []
    assert all(row["median ms"] > 0 and row["peak MB"] >= 0 for row in report.measured(rows))
