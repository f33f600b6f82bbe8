"""Order and number of timed calls, limits of time, processes and memory. No test asserts on a time."""

from __future__ import annotations

import itertools
import os
import time
from functools import partial

import pytest
import torch

from benchmarks import machine, measurement
from benchmarks.measurement import OutOfTimeError, ProcessError, in_process, time_limit

CEILINGS = {"float32 GFLOP/s", "bfloat16 GFLOP/s", "copy GB/s", "exp G/s"}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Clock:
    """A GPU on which each call takes a fixed number of seconds."""

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
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)

    def call(self):
        self.now += self.seconds
        self.calls += 1


@pytest.mark.parametrize("rounds", [2, 3, 7])
def test_every_round_calls_all_and_starts_with_another(rounds):
    order = []
    calls = {name: partial(order.append, name) for name in "abc"}
    times = measurement.interleaved(calls, device="cpu", rounds=rounds, seconds=9.0)
    turns = [order[3 * turn : 3 * turn + 3] for turn in range(rounds)]
    assert len(order) == 3 * rounds and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert [turn[0] for turn in turns] == list(itertools.islice(itertools.cycle("abc"), rounds))
    assert times.keys() == calls.keys()


def test_the_least_rounds_are_made_even_without_time():
    order = []
    measurement.interleaved({"a": partial(order.append, "a")}, device="cpu", rounds=9, seconds=0.0)
    assert len(order) == measurement.LEAST_ROUNDS


def test_median_and_spread_are_those_of_the_times():
    assert measurement.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0 / 3.0)
    assert measurement.summary([2.0]) == (2.0, 0.0)


def test_on_cuda_the_time_is_that_between_two_events(monkeypatch):
    clock = Clock(monkeypatch, 0.3)
    assert measurement.once(clock.call, "cuda") == pytest.approx(0.3)
    assert measurement.once(clock.call, "cuda:1", 7) == pytest.approx(0.3)
    assert clock.calls == 8


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 1), (1e-3, 1), (0.9e-3, 2), (1e-5, 128)])
def test_short_calls_are_timed_together_for_a_millisecond(monkeypatch, seconds, count):
    clock = Clock(monkeypatch, seconds)
    assert measurement.calls_per_sample(clock.call, "cuda") == count
    assert measurement.calls_per_sample(pytest.fail, "cpu") == 1


def test_the_median_is_of_one_call_however_many_are_timed_together(monkeypatch):
    clock = Clock(monkeypatch, 2e-5)
    timing = measurement.interleaved({"a": clock.call}, device="cuda", rounds=3, seconds=9.0)["a"]
    assert timing.median == pytest.approx(2e-5)


def wait():
    while True:
        time.sleep(0.01)


def test_a_time_limit_ends_what_takes_too_long():
    with pytest.raises(OutOfTimeError), time_limit(0.05):
        wait()


def test_a_time_limit_leaves_others_alone():
    with time_limit(60.0), pytest.raises(OutOfTimeError, match="0 s have passed"), time_limit(0.05):
        wait()
    with pytest.raises(OutOfTimeError), time_limit(0.2):
        with time_limit(60.0):
            pass
        wait()


def fail():
    raise KeyError("no such size\nand more")


def die():
    os._exit(7)


def test_a_process_returns_the_result_or_the_error():
    assert in_process(divmod, 17, 5, seconds=60) == (3, 2)
    assert in_process(torch.get_num_threads, seconds=60) == torch.get_num_threads()
    with pytest.raises(ProcessError, match="KeyError: 'no such size"):
        in_process(fail, seconds=60)
    with pytest.raises(ProcessError, match="exit code 7"):
        in_process(die, seconds=60)


def test_a_process_that_takes_too_long_is_killed():
    with pytest.raises(TimeoutError, match="did not end within 0 s"):
        in_process(wait, seconds=0.3)


def numbers(device):
    return 50_000_000


def allocate(numbers):
    """200 MB at once, 100 MB of them only for a moment and half of what came before them."""
    first = torch.ones(numbers // 2)
    del first
    return torch.ones(numbers)


def test_the_memory_of_a_call_is_what_it_allocates():
    assert in_process(measurement.probe, numbers, allocate, seconds=60).peak == pytest.approx(200e6, rel=0.2)


def test_the_machine_is_described_and_its_ceilings_measured():
    assert {"processor", "cores", "threads", "torch", "python"} <= machine.description("cpu").keys()
    ceilings = machine.ceilings("cpu", toy=True)
    assert ceilings.keys() == CEILINGS and all(rate > 0 for rate in ceilings.values())


def test_the_chain_of_exponentials_stays_finite():
    assert machine.chain(torch.tensor([-80.0, 0.0, 80.0])) == pytest.approx(0.567143, abs=1e-4)


def test_bfloat16_is_measured_only_where_the_processor_has_units(monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16_units", lambda: False)
    assert "is not known to have units for bfloat16" in machine.reason_to_skip("bfloat16", "cpu", toy=False)
    others = (("float32", "cpu", False), ("bfloat16", "cuda", False), ("bfloat16", "cpu", True))
    assert not any(machine.reason_to_skip(dtype, device, toy=toy) for dtype, device, toy in others)
    monkeypatch.setattr(machine, "has_bfloat16_units", lambda: True)
    assert not machine.reason_to_skip("bfloat16", "cpu", toy=False)


def test_without_units_there_is_no_ceiling_of_bfloat16(monkeypatch):
    monkeypatch.setattr(machine, "reason_to_skip", lambda dtype, device, toy: "bfloat16" in dtype)
    assert machine.ceilings("cpu", toy=True).keys() == CEILINGS - {"bfloat16 GFLOP/s"}


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_memory_is_what_the_call_takes():
    def call():
        return torch.empty(2**20, device="cuda"), torch.empty(2**22, device="cuda")

    assert measurement.peak_on_cuda(call) == pytest.approx(2**24 + 2**22, rel=0.1)


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_the_machine_is_described_and_its_ceilings_measured():
    assert "CUDA" in machine.description("cuda")
    ceilings = machine.ceilings("cuda", toy=True)
    assert ceilings.keys() == CEILINGS and all(rate > 0 for rate in ceilings.values())
