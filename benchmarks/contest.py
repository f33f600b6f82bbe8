"""A contest: one computation, several candidates. They have to agree before any of them is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks import machine, memory, timing

Row: TypeAlias = dict[str, Any]
Tensors: TypeAlias = tuple[Tensor, ...]

# The largest difference to the first candidate, relative to its result, by the dtype that a candidate computes in.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


TOY_ROUNDS = {"rounds": 2, "least": 2}


class Setting(NamedTuple):
    """How to measure."""

    toy: bool
    device: str


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


class Contest(NamedTuple):
    """Candidates for one computation; ratios are to the first of them.

    `setup` is picklable, takes a device and makes what all candidates share: the same weights, the same inputs.
    """

    sizes: Row
    setup: Callable[[str], Any]
    candidates: dict[str, Candidate]
    work: Callable[[Any], Work]


class DisagreementError(Exception):
    """A candidate that computes something else than the first."""


def compete(contest: Contest, setting: Setting) -> list[Row]:
    """One row a candidate, once all agree."""
    state = contest.setup(setting.device)
    calls = {name: partial(candidate.call, state) for name, candidate in contest.candidates.items()}
    agree(calls, {name: TOLERANCES[candidate.dtype] for name, candidate in contest.candidates.items()})
    before = machine.ceilings(setting.device, toy=setting.toy)
    times = timing.interleaved(calls, device=setting.device, **(TOY_ROUNDS if setting.toy else {}))
    after = machine.ceilings(setting.device, toy=setting.toy)
    ceilings = {name: (rate + after[name]) / 2 for name, rate in before.items()}
    work = contest.work(state)
    del state, calls
    first = next(iter(times.values())).median
    rows = []
    for name, candidate in contest.candidates.items():
        median, spread = times[name]
        timed = {"candidate": name, "median ms": 1000 * median, "spread %": 100 * spread, "ratio": first / median}
        rate = shares(work, median, candidate.dtype, ceilings)
        peak = memory.peak(contest.setup, candidate.call, device=setting.device)
        rows.append({**contest.sizes, **timed, **rate, "peak MB": peak / 1e6})
    return rows


def agree(calls: Mapping[str, Callable[[], Tensors]], tolerances: Mapping[str, float]) -> None:
    """Raises unless every candidate gives what the first gives.

    Raises:
        DisagreementError: says which candidate is how far off.
    """
    names = list(calls)
    wanted = calls[names[0]]()
    for name in names[1:]:
        off = difference(calls[name](), wanted)
        if not off <= tolerances[name]:  # also where it is NaN
            raise DisagreementError(
                f"{name} must agree with {names[0]} to {tolerances[name]:.2g} of its result; it is {off:.2g} off"
            )


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
    """The rate of a candidate, and how much that is of what the machine can do."""
    amounts = {
        "product": (work.flops, ceilings[f"{dtype} GFLOP/s"]),
        "exp": (work.exps, ceilings["exp G/s"]),
        "copy": (work.moved, ceilings["copy GB/s"]),
    }
    parts = {f"% of {name}": amount / seconds / 1e7 / top for name, (amount, top) in amounts.items() if amount}
    return {"GFLOP/s": work.flops / seconds / 1e9, **parts}
