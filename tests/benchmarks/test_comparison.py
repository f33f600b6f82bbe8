"""Candidates agree before they are timed; those that fail, take too long or are not supported are noted."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import comparison, machine, measurement, report
from benchmarks.comparison import Candidate, Comparison, DisagreementError, Setting, Work
from benchmarks.measurement import Probe

CEILINGS = {"float32 GFLOP/s": 100.0, "bfloat16 GFLOP/s": 200.0, "copy GB/s": 10.0, "exp G/s": 1.0}
SETTING = Setting(toy=True, device="cpu")


def ones(device):
    return torch.ones(3)


def same(x):
    return (x,)


def off(x):
    return (x + 1,)


def refuse(x):
    raise RuntimeError("no kernel\nfor this")


def little(_):
    return Work(flops=1.0)


def compared(candidates, setting=SETTING, **sizes):
    return list(comparison.compare_all([Comparison(sizes, ones, candidates, little)], setting))


@pytest.fixture
def no_process(monkeypatch):
    """Probes that take no time, in no process."""
    monkeypatch.setattr(measurement, "in_process", lambda *_, seconds: Probe(seconds=0.0, peak=7e6))


def test_a_candidate_that_differs_is_refused():
    right, wrong = torch.ones(7), torch.ones(7)
    wrong[3] += 0.1
    comparison.check_agreement("also", (right + 1e-6,), "right", (right,), 1e-3)
    message = r"wrong must agree with right to 0\.001 of its result; it is 0\.038 off"
    with pytest.raises(DisagreementError, match=message):
        comparison.check_agreement("wrong", (wrong,), "right", (right,), 1e-3)
    with pytest.raises(DisagreementError, match="nan off"):
        comparison.check_agreement("nan", (right * torch.nan,), "right", (right,), 1e-3)


def test_a_gradient_that_is_zero_except_for_rounding_is_no_difference():
    large, small = torch.ones(100), torch.tensor([1e-9])
    assert comparison.difference((large, -small), (large, small)) < 1e-6
    assert comparison.difference((large, -small), (large * 1e-9, small)) > 1


def test_a_candidate_that_disagrees_is_not_timed(monkeypatch, no_process):
    timed = []

    def interleaved(calls, **_):
        timed.extend(calls)
        return {name: measurement.Timing(1.0, 0.0) for name in calls}

    monkeypatch.setattr(measurement, "interleaved", interleaved)
    rows = compared({"one": Candidate(same), "two": Candidate(off)}, n=3)
    assert timed == ["one"]
    assert "two must agree with one" in rows[1]["note"]


def test_failures_are_noted_and_the_others_measured(no_process):
    candidates = {
        "broken": Candidate(refuse),
        "picky": Candidate(refuse, may_refuse=True),
        "one": Candidate(same),
        "off": Candidate(off, may_refuse=True),
        "two": Candidate(same),
    }
    rows = compared(candidates, n=3)
    assert [row["candidate"] for row in rows] == list(candidates)
    assert [row["candidate"] for row in report.measured(rows)] == ["one", "two"]
    assert rows[2]["ratio"] == 1.0 and rows[2]["peak MB"] == 7.0
    assert rows[0]["note"] == "failed: RuntimeError: no kernel"
    assert rows[1]["note"] == "refused: RuntimeError: no kernel"
    assert report.failures(rows) == [
        "broken: failed: RuntimeError: no kernel",
        "off: failed: DisagreementError: off must agree with one to 0.0001 of its result; it is 1 off",
    ]


def test_a_first_result_that_is_nan_is_no_reference(no_process):
    rows = compared({"nan": Candidate(lambda x: (x * torch.nan,)), "one": Candidate(same)})
    assert [row["candidate"] for row in report.measured(rows)] == ["one"]


def test_a_comparison_that_fails_as_a_whole_has_one_row(no_process):
    these = [
        Comparison({"n": 3}, refuse, {"one": Candidate(same)}, little),
        Comparison({"n": 5}, ones, {"one": Candidate(refuse)}, little),
        Comparison({"n": 7}, ones, {"one": Candidate(same)}, little),
    ]
    rows = list(comparison.compare_all(these, SETTING))
    expected = [(3, "all", True), (5, "one", True), (7, "one", False)]
    assert [(row["n"], row["candidate"], "note" in row) for row in rows] == expected


def test_only_some_comparisons_run(no_process):
    these = [Comparison({"n": n}, ones, {"one": Candidate(same)}, little) for n in (3, 5)]
    rows = comparison.compare_all(these, SETTING._replace(only="n 5"))
    assert [row["n"] for row in rows] == [5]


def test_candidates_fail_in_their_probes_as_they_do_in_the_comparison():
    rows = compared({"broken": Candidate(refuse), "picky": Candidate(refuse, may_refuse=True), "one": Candidate(same)})
    assert [row.get("note") for row in rows] == [
        "failed: RuntimeError: no kernel",
        "refused: RuntimeError: no kernel",
        None,
    ]


def endless(x):
    while True:
        time.sleep(0.01)


def test_a_candidate_that_takes_too_long_is_left_out(monkeypatch):
    def in_process(function, setup, call, *, seconds):
        assert seconds == comparison.CALL_SECONDS
        if call is endless:
            raise TimeoutError(f"did not end within {seconds:.0f} s")
        return Probe(seconds=0.0, peak=0.0)

    monkeypatch.setattr(measurement, "in_process", in_process)
    rows = compared({"endless": Candidate(endless), "one": Candidate(same)})
    assert rows[0]["note"] == "left out: setup and one call did not end within 60 s"
    assert rows[1]["ratio"] == 1.0 and report.failures(rows) == []


def test_without_a_probe_too_a_candidate_that_takes_too_long_is_left_out(monkeypatch, no_process):
    monkeypatch.setattr(comparison, "CALL_SECONDS", 1.0)
    rows = compared({"endless": Candidate(endless), "one": Candidate(same)})
    assert rows[0]["note"] == "left out: one call did not end within 1 s"
    assert rows[1]["ratio"] == 1.0


def test_after_the_deadline_nothing_is_called():
    rows = compared({"one": Candidate(refuse)}, SETTING._replace(deadline=time.monotonic() - 1))
    assert rows == [{"candidate": "one", "note": "left out: the time of the benchmark is over"}]


def test_the_slowest_candidates_are_left_out_where_time_is_short(monkeypatch):
    seconds = iter([300.0, 1e-6, 20.0, 1e-6])
    monkeypatch.setattr(measurement, "in_process", lambda *_, **__: Probe(next(seconds), 0.0))
    setting = SETTING._replace(deadline=time.monotonic() + 60)
    rows = compared({name: Candidate(same) for name in ("slowest", "fast", "slow", "quick")}, setting)
    assert [row["candidate"] for row in report.measured(rows)] == ["fast", "quick"]
    assert "1280 s needed" in rows[0]["note"] and "80 s needed" in rows[2]["note"]
    assert rows[1]["ratio"] == 1.0 and report.failures(rows) == []


def test_a_dtype_without_units_is_left_out(monkeypatch, no_process):
    monkeypatch.setattr(machine, "reason_to_skip", lambda dtype, device, toy: "no units" * (dtype == "bfloat16"))
    rows = compared({"half": Candidate(refuse, "bfloat16"), "one": Candidate(same)})
    assert rows[0]["note"] == "left out: no units" and rows[1]["ratio"] == 1.0
    assert [row["note"] for row in compared({"half": Candidate(refuse, "bfloat16")})] == ["left out: no units"]


def test_copies_together_exceed_the_cache_several_times(monkeypatch):
    class Properties:
        L2_cache_size = 100

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    for size, count in ((0, 64), (1, 64), (10, 40), (90, 5), (100, 4), (399, 2), (400, 1), (999, 1)):
        allocated = iter([1000, 1000 + size])
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda these=allocated: next(these))
        assert comparison.copies(str.upper, "cuda") == ["CUDA"] * count
    assert comparison.copies(str.upper, "cuda", rotates=False) == ["CUDA"]
    assert comparison.copies(str.upper, "cpu") == ["CPU"]


def test_calls_take_copies_in_turn(monkeypatch, no_process):
    seen = []

    def note(x):
        seen.append(int(x[1]))
        return (x[0],)

    monkeypatch.setattr(comparison, "copies", lambda setup, device, rotates: [(torch.ones(2), n) for n in range(3)])
    compared(dict.fromkeys("ab", Candidate(note)))
    assert seen == [0, 1, 2, 0, 1, 2]


def test_on_cuda_memory_is_that_of_warm_calls_here(monkeypatch):
    made, called = [], []

    def setup(device):
        made.append(device)
        return torch.ones(3)

    def call(x):
        called.append(x)
        return (x,)

    monkeypatch.setattr(Setting, "platform", "cuda")
    monkeypatch.setattr(measurement, "peak_on_cuda", lambda call: 3e6 * len(call()))
    setting = SETTING._replace(device="meta")  # no probes there
    monkeypatch.setattr(measurement, "interleaved", lambda calls, **_: {n: measurement.Timing(1.0, 0.0) for n in calls})
    monkeypatch.setattr(machine, "ceilings", lambda device, toy: {})
    candidates = {"one": Candidate(call), "broken": Candidate(refuse)}
    rows = comparison.compare(Comparison({}, setup, candidates, little), setting)
    assert made == ["meta"] and len(called) == 2 + 1  # twice warm, once for the memory
    assert rows[0]["peak MB"] == 3.0


def test_shares_are_of_the_ceiling_of_the_dtype():
    work = Work(flops=50e9, exps=0.5e9, moved=5e9)
    assert comparison.shares(work, 2.0, "float32", CEILINGS) == pytest.approx(
        {"GFLOP/s": 25.0, "% of product": 25.0, "% of exp": 25.0, "% of copy": 25.0}
    )
    expected = {"GFLOP/s": 25.0, "% of product": 12.5}
    assert comparison.shares(Work(50e9), 2.0, "bfloat16", CEILINGS) == pytest.approx(expected)
    assert comparison.shares(Work(1e9, exps=1e9), 1.0, "bfloat16", {"copy GB/s": 1.0}) == {"GFLOP/s": 1.0}


def test_flops_are_those_of_pytorchs_counter():
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5)

    def step():
        torch.autograd.grad(layer(x).sum(), list(layer.parameters()))

    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert comparison.count_flops(step) == counter.get_total_flops() == 2 * 2 * 3 * 5 * 7
