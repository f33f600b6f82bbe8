"""What the benchmarks say is what happened: the tables, the turns, the checks, the memory and the fits. No times."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import perceiver_core as pc
from benchmarks import __main__ as command_line
from benchmarks import attention, child, contest, flops, machine, memory, models, plots, read, report, scaling, timing
from benchmarks.contest import Candidate, Contest, DisagreementError, Setting, Work
from perceiver_core.kernels import reference

CEILINGS = {"float32 GFLOP/s": 100.0, "bfloat16 GFLOP/s": 200.0, "copy GB/s": 10.0, "exp G/s": 1.0}
SETTING = Setting(toy=True, device="cpu")


@pytest.fixture(autouse=True)
def children_start_soon(monkeypatch):
    monkeypatch.setattr(child, "IMPORTS", ["torch", "perceiver_core"])


def test_a_table_is_markdown_with_aligned_columns():
    rows = [{"name": "a", "ms": 0.123456, "n": 7}, {"name": "long", "ms": 1234.5, "n": 11}]
    assert report.table(rows).splitlines() == [
        "| name |    ms |  n |",
        "|-----:|------:|---:|",
        "|    a | 0.123 |  7 |",
        "| long | 1,234 | 11 |",
    ]


@pytest.mark.parametrize("rounds", [2, 3, 7])
def test_turns_are_shared_equally_and_each_starts_with_another(rounds):
    order = []
    calls = {name: partial(order.append, name) for name in "abc"}
    times = timing.interleaved(calls, device="cpu", rounds=rounds, least=2)
    turns = [order[3 * turn : 3 * turn + 3] for turn in range(rounds)]
    assert len(order) == 3 * rounds and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert [turn[0] for turn in turns] == list(itertools.islice(itertools.cycle("abc"), rounds))
    assert times.keys() == calls.keys()


def test_when_time_is_over_there_were_still_the_least_rounds():
    order = []
    timing.interleaved({"a": partial(order.append, "a")}, device="cpu", rounds=9, least=3, seconds=0.0)
    assert len(order) == 3


def test_median_and_spread_are_those_of_the_times():
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0 / 3.0)
    assert timing.summary([2.0]) == (2.0, 0.0)


def test_a_wrong_candidate_is_refused():
    right, wrong = torch.ones(7), torch.ones(7)
    wrong[3] += 0.1
    calls = {"right": lambda: (right,), "also": lambda: (right + 1e-6,), "wrong": lambda: (wrong,)}
    contest.agree({name: calls[name] for name in ("right", "also")}, dict.fromkeys(calls, 1e-3))
    with pytest.raises(
        DisagreementError, match=r"wrong must agree with right to 0\.001 of its result; it is 0\.038 off"
    ):
        contest.agree(calls, dict.fromkeys(calls, 1e-3))
    with pytest.raises(DisagreementError, match="nan off"):
        contest.agree({"right": calls["right"], "nan": lambda: (right * torch.nan,)}, {"nan": 1e-3})


def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference():
    large, small = torch.ones(100), torch.tensor([1e-9])
    assert contest.difference((large, -small), (large, small)) < 1e-6
    assert contest.difference((large, -small), (large * 1e-9, small)) > 1


def test_who_does_not_agree_is_not_timed(monkeypatch):
    timed = []
    monkeypatch.setattr(timing, "interleaved", lambda calls, **_: timed.extend(calls) or {})
    candidates = {"one": Candidate(lambda x: (x,)), "two": Candidate(lambda x: (x + 1,))}
    unfair = Contest({"n": 3}, lambda device: torch.ones(3), candidates, lambda x: Work(flops=1.0))
    rows = contest.compete(unfair, SETTING)
    assert timed == ["one"]
    assert "two must agree with one" in rows[1]["note"]


def test_shares_are_of_the_ceiling_of_the_dtype():
    work = Work(flops=50e9, exps=0.5e9, moved=5e9)
    assert contest.shares(work, 2.0, "float32", CEILINGS) == pytest.approx(
        {"GFLOP/s": 25.0, "% of product": 25.0, "% of exp": 25.0, "% of copy": 25.0}
    )
    assert contest.shares(Work(50e9), 2.0, "bfloat16", CEILINGS) == pytest.approx(
        {"GFLOP/s": 25.0, "% of product": 12.5}
    )


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 1.7])
def test_the_fit_finds_the_power_of_a_power_law(power):
    sizes = [10, 30, 100, 300, 1000]
    assert scaling.exponent(sizes, [0.3 * size**power for size in sizes]) == pytest.approx((power, 0.3))


def test_the_fit_is_by_the_larger_sizes():
    sizes = [10, 100, 1000, 10_000, 100_000]
    assert scaling.exponent(sizes, [5.0, 5.0, 1000.0, 10_000.0, 100_000.0])[0] == pytest.approx(1.0)
    assert scaling.exponent(sizes, [5.0, 0.0, 0.0, 0.0, 0.0])[0] != scaling.exponent(sizes, [0.0] * 5)[0]  # both NaN


def no_setup(device):
    return 50_000_000


def allocate(numbers):
    """200 MB at once, 100 MB of them only for a moment and half of what came before them."""
    first = torch.ones(numbers // 2)
    del first
    return torch.ones(numbers)


def test_the_memory_of_a_call_is_what_it_allocates():
    assert memory.peak(no_setup, allocate) == pytest.approx(200e6, rel=0.2)


def test_flops_are_those_that_torch_counts():
    module, latents, tokens = read.state(read.TOY[0], "cpu")
    with FlopCounterMode(display=False) as counter:
        read.forward(read.READS["einsum"], (module, latents, tokens))
    assert flops.attention(module, latents=latents.shape[1], tokens=tokens.num_tokens) == counter.get_total_flops()


def test_flops_of_an_encoder_are_those_that_torch_counts():
    plain = partial(pc.MultiHeadAttention, kernel=reference)
    encoder = pc.Encoder(
        10,
        num_latents=7,
        dim=12,
        num_reads=3,
        depth=2,
        num_heads=2,
        share=pc.sharing.none,  # so that no keys and values are shared
        cross_attention=partial(pc.CrossAttend, attention=plain),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=plain)),
    )
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(1, 29, 10))
    assert flops.encoder(encoder, tokens=29) == counter.get_total_flops()


@pytest.mark.parametrize("entry", models.entries(toy=True), ids=lambda entry: entry.name)
def test_models_of_other_libraries_agree_with_ours(entry):
    pytest.importorskip(entry.needs)
    for task in entry.tasks:
        agreed = models.contest(entry, task)
        state = agreed.setup("cpu")
        calls = {name: partial(candidate.call, state) for name, candidate in agreed.candidates.items()}
        contest.agree(calls, {name: contest.TOLERANCES[agreed.candidates[name].dtype] for name in calls})
        assert agreed.work(state).flops > 0


def test_a_library_that_is_missing_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(models.peers, "there", lambda module: False)
    results = models.run(SETTING)
    assert results.rows == []
    assert "transformers trunk: left out, transformers is not installed" in results.notes


def test_a_candidate_that_would_need_too_much_is_left_out_and_named(monkeypatch):
    def measured(given, setting):
        tokens = math.prod(map(int, given.sizes["grid"].split(" x ")))
        columns = {"median ms": 1.0, "spread %": 0.0, "GFLOP/s": 1.0}
        return [
            {"candidate": name, **columns, "peak MB": tokens * (1.0 if name == "einsum" else 1e-3)}
            for name in given.candidates
        ]

    monkeypatch.setattr(scaling, "compete", measured)
    results = scaling.run(SETTING)
    by_tokens = [row["size"] for row in results.rows if row["along"] == "tokens" and row["candidate"] == "einsum"]
    assert by_tokens == [1000, 3000]
    assert "tokens: einsum, left out at 10,000, where it would need 10.0 GB" in results.notes
    assert "tokens: sdpa, time grows as n^0.00, memory grows as n^1.00" in results.notes


def test_the_machine_says_what_it_is_and_reaches():
    assert {"processor", "cores", "threads", "torch", "python"} <= machine.description("cpu").keys()
    reached = machine.ceilings("cpu", toy=True)
    assert reached.keys() == CEILINGS.keys() and all(rate > 0 for rate in reached.values())


def test_curves_are_drawn(tmp_path):
    rows = [
        {"along": along, "size": size, "candidate": name, "median ms": 0.1 * size, "peak MB": float(size)}
        for along, size, name in itertools.product(("tokens", "latents"), (10, 100, 1000), "ab")
    ]
    plots.curves(rows, tmp_path / "curves.png", measures=scaling.MEASURES, fit=scaling.exponent, title="Growth")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "attention", "--toy", "--out", str(tmp_path)])
    command_line.main()
    assert "| latents |" in capsys.readouterr().out
    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert [row["candidate"] for row in written["rows"]] == [*attention.KERNELS, "structured"] * 2
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_errors_of_the_command_name_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "no benchmark nothing; there are attention, read, choice" in capsys.readouterr().err


def test_help_lists_the_benchmarks(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        command_line.main()
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in command_line.BENCHMARKS)
