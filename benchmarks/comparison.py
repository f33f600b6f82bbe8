"""Comparison of several candidates for one computation, which have to agree before any of them is timed.

Every measurement is bounded. On the CPU each candidate is probed first: one call in a fresh process, which is killed
after `CALL_SECONDS`. A candidate that does not end in time, or for which the time left to the benchmark does not
suffice, is left out with a note.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import machine, measurement
from benchmarks.report import FAILED, LEFT_OUT, REFUSED, Row, describe_error

Tensors: TypeAlias = tuple[Tensor, ...]

# Largest differences to the first candidate, relative to its result, by the dtype that a candidate computes in.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
CALL_SECONDS = 60.0  # that setup and one call of a candidate may take together, compilation included
TIMING_SECONDS = 8.0  # after which no further round of a comparison begins
ROUNDS, TOY_ROUNDS = 15, 2
CACHES, MOST_COPIES = 4, 64  # L2 caches of the GPU that all copies of the inputs would fill, and their number


class Setting(NamedTuple):
    """Options of a measurement."""

    toy: bool
    device: str
    only: str = ""  # a text; comparisons whose sizes do not contain it are skipped
    deadline: float = math.inf  # on the clock of `time.monotonic`

    @property
    def platform(self) -> str:
        """Key of the sizes and candidates for the device: "cuda" for an NVIDIA GPU, "cpu" for all others."""
        return "cuda" if self.device.startswith("cuda") else "cpu"

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self.deadline - time.monotonic(), 0.0)


class Work(NamedTuple):
    """Amount of work of the ordinary computation, whatever a candidate does instead."""

    flops: float
    exps: float = 0.0  # of the softmax: one for each score
    moved: float = 0.0  # bytes of all inputs and outputs, each counted once


class Candidate(NamedTuple):
    """One implementation: a picklable function from the state that the setup made to tensors that all agree on."""

    call: Callable[[Any], Tensors]
    dtype: str = "float32"
    may_refuse: bool = False  # for code that takes some sizes only, or more memory than available


class Comparison(NamedTuple):
    """Candidates for one computation; ratios are to the first of them that is measured."""

    sizes: Row
    setup: Callable[[str], Any]  # picklable; from a device to the state, the same each time
    candidates: dict[str, Candidate]
    work: Callable[[Any], Work]
    rotates: bool = True  # whether small inputs need copies; a whole model exceeds a cache by itself


class FlopCounter(TorchDispatchMode):
    """FLOPs by the formulas of PyTorch's FlopCounterMode, which itself fails in `autograd.grad`."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its FLOPs."""
        out, formula = func(*args, **(kwargs or {})), flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


class DisagreementError(Exception):
    """A candidate computes something else than the first."""


def compare_all(comparisons: Iterable[Comparison], setting: Setting) -> Iterator[Row]:
    """Yield the rows of all comparisons that the setting selects; one that fails as a whole has one row with a note."""
    for comparison in comparisons:
        if setting.only not in ", ".join(f"{name} {value}" for name, value in comparison.sizes.items()):
            continue
        try:
            yield from compare(comparison, setting)
        except Exception as error:
            yield {**comparison.sizes, "candidate": "all", "note": FAILED + describe_error(error)}
        _release_memory()


def compare(comparison: Comparison, setting: Setting) -> list[Row]:
    """Return a row for each candidate: its measurements, or a note with the reason why there are none."""
    notes, late = {}, "" if setting.remaining else "the time of the benchmark is over"
    for name, candidate in comparison.candidates.items():
        if reason := late or machine.reason_to_skip(candidate.dtype, setting.device, toy=setting.toy):
            notes[name] = LEFT_OUT + reason
    probes = _probed(comparison, setting, notes) if setting.device == "cpu" else {}
    rows = _measured(comparison, setting, notes) if len(notes) < len(comparison.candidates) else {}
    for name in rows.keys() & probes.keys():
        rows[name]["peak MB"] = probes[name].peak / 1e6
    return [
        {**comparison.sizes, "candidate": name, **(rows.get(name) or {"note": notes[name]})}
        for name in comparison.candidates
    ]


def _probed(comparison: Comparison, setting: Setting, notes: dict[str, str]) -> dict[str, measurement.Probe]:
    """Probe each candidate without a note in its own process; add notes on those that fail or take too long.

    The slowest are left out until one warm call of each and the least rounds fit into the time that remains.
    """
    probes = {}
    for name, candidate in comparison.candidates.items():
        if name in notes:
            continue
        try:
            arguments, seconds = (comparison.setup, candidate.call), min(CALL_SECONDS, setting.remaining)
            probes[name] = measurement.in_process(measurement.probe, *arguments, seconds=seconds)
        except TimeoutError as error:
            notes[name] = f"{LEFT_OUT}setup and one call {error}"
        except measurement.ProcessError as error:
            notes[name] = (REFUSED if candidate.may_refuse else FAILED) + str(error)
    needed = {name: probe.seconds * (1 + measurement.LEAST_ROUNDS) for name, probe in probes.items()}
    while (total := sum(needed.values())) > (left := setting.remaining):
        slowest = max(needed, key=lambda name: needed[name])
        notes[slowest] = f"{LEFT_OUT}{total:.0f} s needed, {left:.0f} s of the benchmark left"
        del needed[slowest]
    return probes


def _measured(comparison: Comparison, setting: Setting, notes: dict[str, str]) -> dict[str, Row]:
    """Measure the candidates without a note; add notes on those that do not agree."""
    cuda = setting.platform == "cuda"
    if cuda:
        torch.compiler.reset()  # graphs of earlier comparisons count against a limit
    states = copies(comparison.setup, setting.device, rotates=comparison.rotates)
    cycle = itertools.cycle(states)
    candidates = {name: each for name, each in comparison.candidates.items() if name not in notes}
    calls = {name: lambda call=each.call: call(next(cycle)) for name, each in candidates.items()}
    notes |= faults(calls, candidates, setting, calls_each=1 + (len(states) if cuda else 0))  # so that all are warm
    calls = {name: call for name, call in calls.items() if name not in notes}
    if not calls:
        return {}
    work = comparison.work(states[0])
    before = machine.ceilings(setting.device, toy=setting.toy)
    rounds, seconds = TOY_ROUNDS if setting.toy else ROUNDS, min(TIMING_SECONDS, setting.remaining)
    times = measurement.interleaved(calls, device=setting.device, rounds=rounds, seconds=seconds)
    after = machine.ceilings(setting.device, toy=setting.toy)
    ceilings = {name: (rate + after[name]) / 2 for name, rate in before.items() if name in after}
    first = times[next(iter(calls))].median
    rows = {}
    for name, (median, spread) in times.items():
        rows[name] = {"median ms": 1000 * median, "spread %": 100 * spread, "ratio": first / median}
        rows[name] |= shares(work, median, candidates[name].dtype, ceilings)
        if cuda:
            rows[name]["peak MB"] = measurement.peak_on_cuda(partial(candidates[name].call, states[0])) / 1e6
    return rows


def copies(setup: Callable[[str], Any], device: str, *, rotates: bool = True) -> list[Any]:
    """Make the states that calls take in turn: on CUDA so many that no call finds its inputs in the L2 cache."""
    if not device.startswith("cuda") or not rotates:
        return [setup(device)]
    before, cache = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(device).L2_cache_size
    first = setup(device)
    count = -(-CACHES * cache // max(1, torch.cuda.memory_allocated() - before))
    return [first, *(setup(device) for _ in range(min(count, MOST_COPIES) - 1))]


def _release_memory() -> None:
    """Release the memory that an error has kept, above all that of the GPU."""
    gc.collect()
    with suppress(RuntimeError):  # if the error has made the GPU unusable
        torch.cuda.empty_cache()


def faults(
    calls: Mapping[str, Callable[[], Tensors]],
    candidates: Mapping[str, Candidate],
    setting: Setting,
    calls_each: int = 1,
) -> dict[str, str]:
    """Return notes on candidates that raise, do not end in time or differ from the first that does neither."""
    notes: dict[str, str] = {}
    first: tuple[str, Tensors] | None = None
    for name, call in calls.items():
        try:
            with measurement.time_limit(seconds := min(CALL_SECONDS, setting.remaining)):
                for _ in range(calls_each):
                    result = call()
            first = first or (name, result)
            check_agreement(name, result, *first, TOLERANCES[candidates[name].dtype])
        except measurement.OutOfTimeError:
            notes[name] = f"{LEFT_OUT}one call did not end within {seconds:.0f} s"
        except Exception as error:
            refused = candidates[name].may_refuse and not isinstance(error, DisagreementError)
            notes[name] = (REFUSED if refused else FAILED) + describe_error(error)
            first = None if first and first[0] == name else first  # a first result that is NaN is no reference
        if name in notes:
            _release_memory()
    return notes


def check_agreement(name: str, actual: Tensors, first: str, expected: Tensors, tolerance: float) -> None:
    """Raise DisagreementError unless a candidate returns what the first returns."""
    off = difference(actual, expected)
    if not off <= tolerance:  # also if it is NaN
        raise DisagreementError(f"{name} must agree with {first} to {tolerance:.2g} of its result; it is {off:.2g} off")


def difference(actual: Tensors, expected: Tensors) -> float:
    """Return the norm of the difference relative to that of the expected tensor, for the tensor where it is largest.

    A tensor whose norm is below a thousandth of the largest norm is related to that thousandth: gradients that are zero
    except for rounding, such as those of a key's bias, have no scale of their own.
    """
    norms = [float(tensor.float().norm()) for tensor in expected]
    triples = zip(actual, expected, norms, strict=True)
    return max(float((a.float() - b.float()).norm()) / max(norm, 1e-3 * max(norms)) for a, b, norm in triples)


def count_flops(call: Callable[..., object], *arguments: object) -> float:
    """Return the FLOPs of the matrix products of a call, whose tensors are best on the meta device."""
    with FlopCounter() as counter:
        call(*arguments)
    return counter.total


def shares(work: Work, seconds: float, dtype: str, ceilings: dict[str, float]) -> Row:
    """Return the rate of a candidate, and its percentages of the ceilings that were measured."""
    parts = zip(("product", "exp", "copy"), (f"{dtype} GFLOP/s", "exp G/s", "copy GB/s"), work, strict=True)
    percentages = {
        f"% of {name}": amount / seconds / 1e7 / ceilings[ceiling]
        for name, ceiling, amount in parts
        if amount and ceiling in ceilings
    }
    return {"GFLOP/s": work.flops / seconds / 1e9, **percentages}
