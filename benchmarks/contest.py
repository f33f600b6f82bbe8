"""A contest: one computation, several candidates. They have to agree before any of them is timed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks import failures, machine, memory, rotation, timing

Row: TypeAlias = dict[str, Any]
Tensors: TypeAlias = tuple[Tensor, ...]

# The largest difference to the first candidate, relative to its result, by the dtype that a candidate computes in.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


TOY_ROUNDS = {"rounds": 2, "least": 2}


class Setting(NamedTuple):
    """How to measure."""

    toy: bool
    device: str
    only: str = ""  # contests are left out whose sizes do not say this
    log: Path | None = None  # a file to which each contest's rows go as soon as it is over

    @property
    def cuda(self) -> bool:
        """Whether it is on an NVIDIA GPU."""
        return self.device.startswith("cuda")


class Results(NamedTuple):
    """What a benchmark found: rows of one table, and what has to be said beside it."""

    rows: list[Row]
    notes: list[str]


class Work(NamedTuple):
    """How much there is to do, by the mathematics of the ordinary computation, whatever a candidate does instead."""

    flops: float
    exps: float = 0.0  # of the softmax, once for each score
    moved: float = 0.0  # bytes of what goes in and of what comes out, each once


class Candidate(NamedTuple):
    """One way to compute: a picklable function of what the contest's setup made, to tensors that all agree on."""

    call: Callable[[Any], Tensors]
    dtype: str = "float32"
    may_refuse: bool = False  # not ours to mend: it takes some sizes only, or more memory than there is


class Contest(NamedTuple):
    """Candidates for one computation; ratios are to the first of them.

    `setup` is picklable, takes a device and makes what all candidates share: the same weights, the same inputs,
    each time that it is called.
    """

    sizes: Row
    setup: Callable[[str], Any]
    candidates: dict[str, Candidate]
    work: Callable[[Any], Work]
    rotates: bool = True  # whether small inputs need copies; a whole model goes through more than a cache by itself


class DisagreementError(Exception):
    """A candidate that computes something else than the first."""


def compete_all(contests: Iterable[Contest], setting: Setting) -> list[Row]:
    """The rows of all contests that the setting asks for. One that cannot be set up has a row that says why."""
    rows: list[Row] = []
    for contest in contests:
        if setting.only not in ", ".join(f"{name} {value}" for name, value in contest.sizes.items()):
            continue
        try:
            rows += compete(contest, setting)
        except Exception as error:
            note = failures.FAILED + failures.words(error)
            rows.append(_kept({**contest.sizes, "candidate": "all", "note": note}, setting))
        failures.clean()
    return rows


def compete(contest: Contest, setting: Setting) -> list[Row]:
    """One row a candidate, of those that agree; of the others a row that says why they were not timed."""
    if setting.cuda:
        torch.compiler.reset()  # what contests before this one compiled counts against a limit
    states = rotation.states(contest.setup, setting.device, rotates=contest.rotates)
    turn = itertools.cycle(states)
    calls = {name: partial(_next, candidate.call, turn) for name, candidate in contest.candidates.items()}
    again = len(states) if setting.cuda else 0  # so that all are warm on every copy
    why_not = faults({name: partial(_warm, call, again) for name, call in calls.items()}, contest.candidates)
    calls = {name: call for name, call in calls.items() if name not in why_not}
    times, ceilings = _timed(calls, setting) if calls else ({}, {})
    work, state = contest.work(states[0]), states[0] if setting.cuda else None
    del states, turn, calls  # on the CPU memory is measured in a process of its own
    first = next(iter(times.values())).median if times else 0.0
    rows = []
    for name, candidate in contest.candidates.items():
        found: Row = {"note": why_not.get(name)}
        if name in times:
            median, spread = times[name]
            found = {"median ms": 1000 * median, "spread %": 100 * spread, "ratio": first / median}
            found |= shares(work, median, candidate.dtype, ceilings) | _memory(contest, candidate, state)
        rows.append(_kept({**contest.sizes, "candidate": name, **found}, setting))
    return rows


def _timed(
    calls: Mapping[str, Callable[[], object]], setting: Setting
) -> tuple[dict[str, timing.Timing], dict[str, float]]:
    """What the calls take, and what the machine reaches meanwhile."""
    before = machine.ceilings(setting.device, toy=setting.toy)
    times = timing.interleaved(calls, device=setting.device, **(TOY_ROUNDS if setting.toy else {}))
    after = machine.ceilings(setting.device, toy=setting.toy)
    return times, {name: (rate + after[name]) / 2 for name, rate in before.items() if name in after}


def _memory(contest: Contest, candidate: Candidate, state: Any) -> Row:
    """What a call needs: on CUDA of the state that it was timed on, elsewhere of a new one in another process."""
    if state is None:
        return {"peak MB": memory.peak(contest.setup, candidate.call) / 1e6}
    call = partial(candidate.call, state)
    largest = memory.largest_allocation(call)
    return {
        "peak MB": memory.peak_on_cuda(call) / 1e6,
        **({} if largest is None else {"largest MB": largest / 1e6}),
    }


def _next(call: Callable[[Any], Tensors], turn: Iterator[Any]) -> Tensors:
    return call(next(turn))


def _warm(call: Callable[[], Tensors], again: int) -> Tensors:
    """What a call gives, which is made again some times."""
    got = call()
    for _ in range(again):
        call()
    return got


def _kept(row: Row, setting: Setting) -> Row:
    """The row, once it is written down."""
    if setting.log is not None:
        setting.log.parent.mkdir(parents=True, exist_ok=True)
        with setting.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
    return row


def faults(calls: Mapping[str, Callable[[], Tensors]], candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """Why candidates take no part: what they raise, or how far they are off the first that raises nothing."""
    found: dict[str, str] = {}
    first: tuple[str, Tensors] | None = None
    for name, call in calls.items():
        try:
            got = call()
            _check(name, got, *(first or (name, got)), TOLERANCES[candidates[name].dtype])
            first = first or (name, got)
        except Exception as error:
            refused = candidates[name].may_refuse and not isinstance(error, DisagreementError)
            found[name] = (failures.REFUSED if refused else failures.FAILED) + failures.words(error)
        if name in found:
            failures.clean()
    return found


def agree(calls: Mapping[str, Callable[[], Tensors]], tolerances: Mapping[str, float]) -> None:
    """Raises unless every candidate gives what the first gives.

    Raises:
        DisagreementError: says which candidate is how far off.
    """
    names = list(calls)
    wanted = calls[names[0]]()
    for name in names[1:]:
        _check(name, calls[name](), names[0], wanted, tolerances[name])


def _check(name: str, got: Tensors, first: str, wanted: Tensors, tolerance: float) -> None:
    off = difference(got, wanted)
    if not off <= tolerance:  # also where it is NaN
        raise DisagreementError(f"{name} must agree with {first} to {tolerance:.2g} of its result; it is {off:.2g} off")


def difference(got: Tensors, wanted: Tensors) -> float:
    """The norm of the difference relative to that of what is wanted, of the tensor where it is largest.

    A tensor below a thousandth of the largest is held against that thousandth: gradients that are zero but for
    rounding, such as those of a key's bias, have no scale of their own.
    """
    sizes = [float(torch.linalg.vector_norm(tensor.float())) for tensor in wanted]
    pairs = zip(got, wanted, sizes, strict=True)
    return max(
        float(torch.linalg.vector_norm(a.float() - b.float())) / max(size, 1e-3 * max(sizes)) for a, b, size in pairs
    )


def shares(work: Work, seconds: float, dtype: str, ceilings: dict[str, float]) -> Row:
    """The rate of a candidate, and how much that is of what the machine can do, as far as that is known."""
    amounts = {
        "product": (work.flops, f"{dtype} GFLOP/s"),
        "exp": (work.exps, "exp G/s"),
        "copy": (work.moved, "copy GB/s"),
    }
    parts = {
        f"% of {name}": amount / seconds / 1e7 / ceilings[top]
        for name, (amount, top) in amounts.items()
        if amount and top in ceilings
    }
    return {"GFLOP/s": work.flops / seconds / 1e9, **parts}
