"""Timing that is fair to what it compares.

On CUDA a call is timed by two events on the GPU's own clock, in microseconds, of which one call may take few. So as
many calls as take a millisecond stand back to back between the two events, and count each the same. What the GPU waits
for the processor to launch is in the time, as it is for whoever makes such calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

LEAST = 1e-3  # seconds between two events


class Timing(NamedTuple):
    """What the calls of one candidate took."""

    median: float  # seconds
    spread: float  # interquartile range / median


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, device: str, rounds: int = 15, least: int = 3, seconds: float = 20.0
) -> dict[str, Timing]:
    """Times calls in turns: each once a round (on CUDA: `enough` times), and every round starts with another one.

    Calls are warm when they come here: whoever times them has run each before. There are `rounds` of them, fewer
    where `seconds` are over before, but at `least` that many.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: enough(call, device) for name, call in calls.items()}
    began, names = time.perf_counter(), list(calls)
    for turn in range(max(rounds, least)):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(once(calls[name], device, counts[name]))
    return {name: summary(times) for name, times in taken.items()}


def enough(call: Callable[[], object], device: str) -> int:
    """How many calls to time together: one, and on CUDA as many as take a millisecond, as a power of two."""
    count = 1
    while device.startswith("cuda") and count * once(call, device, count) < LEAST:
        count *= 2
    return count


def once(call: Callable[[], object], device: str, count: int = 1) -> float:
    """The seconds of one call, by so many in a row."""
    if device.startswith("cuda"):
        return _by_events(call, count) / count
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - start) / count


def _by_events(call: Callable[[], object], count: int) -> float:
    """The seconds between two events, one before the calls and one after them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def summary(times: list[float]) -> Timing:
    """Median and spread of what calls took."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(middle, (high - low) / middle)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
