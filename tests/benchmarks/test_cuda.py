"""What the benchmarks do on a GPU: on the CPU at toy size, with events and memory that are made up; and on a GPU."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import (
    contest,
    cuda_attention,
    cuda_models,
    cuda_read,
    failures,
    machine,
    memory,
    peers,
    plots,
    read,
    report,
    rotation,
    timing,
)
from benchmarks.contest import Candidate, Contest, Setting, Work

SETTING = Setting(toy=True, device="cpu")
GPU = Setting(toy=True, device="cuda")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Clock:
    """A GPU on which each call takes so many seconds."""

    def __init__(self, monkeypatch, seconds):
        clock, self.now, self.calls, self.seconds = self, 0.0, 0, seconds

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, end):
                return 1000 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self):
        self.now += self.seconds
        self.calls += 1


def test_on_cuda_the_time_is_that_between_two_events(monkeypatch):
    clock = Clock(monkeypatch, 0.3)
    assert timing.once(clock.call, "cuda") == pytest.approx(0.3)
    assert timing.once(clock.call, "cuda:1", 7) == pytest.approx(0.3)
    assert clock.calls == 8


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 1), (1e-3, 1), (0.9e-3, 2), (1e-5, 128)])
def test_short_calls_stand_in_a_row_of_a_millisecond(monkeypatch, seconds, count):
    clock = Clock(monkeypatch, seconds)
    assert timing.enough(clock.call, "cuda") == count
    assert timing.enough(pytest.fail, "cpu") == 1


def test_the_median_is_of_one_call_however_many_stand_in_a_row(monkeypatch):
    clock = Clock(monkeypatch, 2e-5)
    assert timing.interleaved({"a": clock.call}, device="cuda", rounds=3)["a"].median == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("held", "count"), [(0, 64), (1, 64), (10, 40), (90, 5), (100, 4), (399, 2), (400, 1), (999, 1)]
)
def test_copies_together_are_four_times_the_cache(held, count):
    assert rotation.copies(held, cache=100) == count


def test_copies_are_made_by_what_the_first_takes(monkeypatch):
    taken = iter([1000, 1300])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(taken))
    monkeypatch.setattr(rotation, "_cache", lambda device: 150)
    assert rotation.states(str.upper, "cuda") == ["CUDA", "CUDA"]
    assert rotation.states(str.upper, "cuda", rotates=False) == ["CUDA"]
    assert rotation.states(str.upper, "cpu") == ["CPU"]


def made_of(device):
    return torch.ones(3)


def one(x):
    return (x,)


def off(x):
    return (x + 1,)


def refuse(x):
    raise RuntimeError("no kernel\nfor this")


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda setup, call: 7e6)


def test_who_fails_takes_nothing_from_the_others(no_memory):
    candidates = {
        "broken": Candidate(refuse),
        "picky": Candidate(refuse, may_refuse=True),
        "one": Candidate(one),
        "off": Candidate(off, may_refuse=True),
        "two": Candidate(one),
    }
    rows = contest.compete_all([Contest({"n": 3}, made_of, candidates, lambda x: Work(flops=1.0))], SETTING)
    assert [row["candidate"] for row in rows] == list(candidates)
    assert [row["candidate"] for row in failures.measured(rows)] == ["one", "two"]
    assert rows[2]["ratio"] == 1.0 and rows[2]["peak MB"] == 7.0
    assert rows[0]["note"] == "failed: RuntimeError: no kernel"
    assert rows[1]["note"] == "refused: RuntimeError: no kernel"
    assert failures.failed(rows) == [
        "broken: failed: RuntimeError: no kernel",
        "off: failed: DisagreementError: off must agree with one to 0.0001 of its result; it is 1 off",
    ]


def test_a_first_that_is_no_number_is_no_measure(no_memory):
    candidates = {"nan": Candidate(lambda x: (x * torch.nan,)), "one": Candidate(one)}
    rows = contest.compete(Contest({}, made_of, candidates, lambda x: Work(flops=1.0)), SETTING)
    assert [row["candidate"] for row in failures.measured(rows)] == ["one"]


def test_what_cannot_be_set_up_or_by_nobody_computed_has_a_row(no_memory):
    given = [
        Contest({"n": 3}, refuse, {"one": Candidate(one)}, lambda x: Work(flops=1.0)),
        Contest({"n": 5}, made_of, {"one": Candidate(refuse)}, lambda x: Work(flops=1.0)),
        Contest({"n": 7}, made_of, {"one": Candidate(one)}, lambda x: Work(flops=1.0)),
    ]
    rows = contest.compete_all(given, SETTING)
    assert [(row["n"], row["candidate"], "note" in row) for row in rows] == [
        (3, "all", True),
        (5, "one", True),
        (7, "one", False),
    ]


def test_only_some_contests_run_and_their_rows_are_kept_at_once(no_memory, tmp_path):
    given = [Contest({"n": n}, made_of, {"one": Candidate(one)}, lambda x: Work(flops=1.0)) for n in (3, 5)]
    setting = SETTING._replace(only="n 5", log=tmp_path / "new" / "rows.jsonl")
    rows = contest.compete_all(given, setting)
    assert [row["n"] for row in rows] == [5]
    assert [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()] == rows


def test_calls_take_copies_in_turns(monkeypatch, no_memory):
    seen = []

    def note(x):
        seen.append(int(x[1]))
        return (x[0],)

    monkeypatch.setattr(rotation, "states", lambda setup, device, rotates: [(torch.ones(2), n) for n in range(3)])
    contest.compete(Contest({}, made_of, dict.fromkeys("ab", Candidate(note)), lambda x: Work(flops=1.0)), SETTING)
    assert seen == list(itertools.islice(itertools.cycle(range(3)), len(seen))) and len(seen) == 6


def test_on_cuda_memory_is_that_of_warm_calls_here(monkeypatch):
    made, called = [], []
    monkeypatch.setattr(Setting, "cuda", True)
    monkeypatch.setattr(memory, "peak_on_cuda", lambda call: 3e6 * len(call()))
    monkeypatch.setattr(memory, "largest_allocation", lambda call: 2e6 * len(call()))
    candidates = {"one": Candidate(lambda x: called.append(x) or (x,)), "broken": Candidate(refuse)}
    given = Contest({}, lambda device: made.append(device) or torch.ones(3), candidates, lambda x: Work(flops=1.0))
    rows = contest.compete(given, SETTING)
    assert made == ["cpu"] and len(called) == 1 + 1 + contest.TOY_ROUNDS["rounds"] + 2
    assert rows[0]["peak MB"] == 3.0 and rows[0]["largest MB"] == 2.0
    monkeypatch.setattr(memory, "largest_allocation", lambda call: None)
    assert "largest MB" not in contest.compete(given, SETTING)[0]


def test_a_table_leaves_empty_what_a_row_has_not():
    rows = [{"name": "a", "note": "refused"}, {"name": "b", "ms": 1, "MB": 2}]
    assert report.table(rows).splitlines()[2:] == ["|    a |    |    | refused |", "|    b |  1 |  2 |         |"]
    assert plots.bars(rows[:1], None, title="") is None


def test_without_a_ceiling_there_is_no_share_of_it():
    assert contest.shares(Work(1e9, exps=1e9), 1.0, "bfloat16", {"copy GB/s": 1.0}) == {"GFLOP/s": 1.0}


def test_the_chain_of_exponentials_stays_finite():
    assert machine.chain(torch.tensor([-80.0, 0.0, 80.0])) == pytest.approx(0.567143, abs=1e-4)


def test_the_largest_allocation_is_found_among_others():
    entries = [("alloc", 5), ("segment_alloc", 99), ("alloc", 7), ("free_requested", 8)]
    trace = [{"action": action, "size": size} for action, size in entries]
    assert memory.largest([[], trace]) == 7.0
    assert memory.largest([[]]) == 0.0


def test_the_command_goes_on_after_a_failure_and_tells_of_it(monkeypatch, tmp_path):
    def broken(setting):
        raise ValueError("no such thing")

    refused = [{"candidate": "a", "note": "failed: KeyError: x"}, {"candidate": "b", "note": "refused: y"}]
    monkeypatch.setattr(command_line.BENCHMARKS["read"], "run", broken)
    monkeypatch.setattr(command_line.BENCHMARKS["models"], "run", lambda setting: contest.Results(refused, []))
    monkeypatch.setattr("sys.argv", ["benchmarks", "read", "models", "--toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code.splitlines()[1:] == ["read: ValueError: no such thing", "models: a: failed: KeyError: x"]
    assert json.loads((tmp_path / "models.json").read_text())["rows"] == refused


def test_on_cuda_three_benchmarks_have_tables_of_their_own():
    assert command_line._benchmarks("cpu") == command_line.BENCHMARKS
    on_cuda = command_line._benchmarks("cuda:0")
    assert on_cuda.keys() == command_line.BENCHMARKS.keys()
    assert [on_cuda[name] for name in ("attention", "read", "models")] == [cuda_attention, cuda_read, cuda_models]


def agreed(given, names):
    """What candidates give that agree, on the CPU."""
    state = given.setup("cpu")
    calls = {name: partial(given.candidates[name].call, state) for name in names}
    contest.agree(calls, {name: contest.TOLERANCES[given.candidates[name].dtype] for name in names})
    assert given.work(state).flops > 0


@pytest.mark.parametrize("given", list(cuda_attention.contests(toy=True)), ids=lambda given: given.sizes["direction"])
def test_attention_agrees_whatever_the_kernel(given):
    agreed(given, [name for name in given.candidates if name not in ("PyTorch cuDNN", "PyTorch efficient")])


def test_only_keys_that_are_there_are_work():
    ragged = cuda_attention.tensors(cuda_attention.TOY[1], "cpu")
    whole = cuda_attention._work(1, ragged._replace(there=None))
    part = cuda_attention._work(1, ragged)
    assert part.flops / whole.flops == pytest.approx(ragged.there.float().mean().item())
    assert ragged.there.any(1).all() and not ragged.there.all()


@pytest.mark.parametrize("given", list(cuda_read.contests(toy=True)), ids=lambda given: given.sizes["direction"])
def test_reads_agree_whatever_the_way(given):
    agreed(given, [name for name in given.candidates if not name.endswith("compiled")])


@pytest.mark.parametrize("head", [7, 8])
def test_heads_widened_by_zeros_read_the_same(head):
    sizes = read.TOY[0]._replace(head=head, batch=2)
    given = read.contest(
        sizes, "with backward", {"plain": read.READS["sdpa"], "wide": partial(cuda_read.fused, "FLASH_ATTENTION")}
    )
    agreed(given, list(given.candidates))
    layer = given.setup("cpu")[0].attention.key
    weight, bias = cuda_read.widened(layer, sizes.heads)
    assert weight.shape == (sizes.heads * 8, layer.in_features) and bias.shape == (sizes.heads * 8,)


@pytest.mark.compile
@pytest.mark.slow
def test_reads_that_are_compiled_agree():
    given = next(iter(cuda_read.contests(toy=True)))
    agreed(given, ["PyTorch", "PyTorch flash, compiled", "dense, compiled", "structured, compiled"])


@pytest.mark.parametrize("entry", cuda_models.entries(toy=True), ids=lambda entry: entry.name)
def test_models_under_autocast_agree(entry):
    pytest.importorskip(entry.needs)
    given = cuda_models.contest(entry)
    agreed(given, [name for name in given.candidates if not name.endswith("compiled")])


def test_models_are_in_float32_at_the_smaller_batch_only():
    small, large = (
        [entry for entry in cuda_models.entries(toy=False) if entry.shape[0] == batch] for batch in cuda_models.BATCHES
    )
    assert all(entry.candidates[0] in ("ours", "perceiver-pytorch", "transformers") for entry in small)
    assert all(cuda_models.AUTOCAST in name for entry in large for name in entry.candidates)
    assert all("ours, autocast, compiled" in entry.candidates for entry in (*small, *large))


def test_on_a_gpu_too_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(peers, "there", lambda module: False)
    results = cuda_models.run(SETTING)
    assert results.rows == [] and "transformers trunk: left out, transformers is not installed" in results.notes


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", list(command_line.ON_CUDA))
def test_on_a_gpu_all_that_is_not_refused_is_measured(name):
    rows = command_line.ON_CUDA[name].run(GPU).rows
    assert failures.failed(rows) == []
    assert all(row["median ms"] > 0 and row["largest MB"] <= row["peak MB"] + 1 for row in failures.measured(rows))


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_memory_is_what_the_call_takes():
    def call():
        first = torch.empty(2**20, device="cuda")
        second = torch.empty(2**22, device="cuda")
        return first, second

    assert memory.largest_allocation(call) == 2**24
    assert memory.peak_on_cuda(call) == pytest.approx(2**24 + 2**22, rel=0.1)


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_the_machine_says_what_it_is_and_reaches():
    assert {"multiprocessors", "driver", "CUDA", "triton"} <= machine.description("cuda").keys()
    reached = machine.ceilings("cuda", toy=True)
    assert reached.keys() == {"float32 GFLOP/s", "bfloat16 GFLOP/s", "copy GB/s", "exp G/s"}
    assert all(rate > 0 for rate in reached.values())
