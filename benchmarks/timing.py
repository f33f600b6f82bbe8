"""Timing that is fair to what it compares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """What the calls of one candidate took."""

    median: float  # seconds
    spread: float  # interquartile range / median


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, device: str, rounds: int = 15, least: int = 3, seconds: float = 20.0
) -> dict[str, Timing]:
    """Times calls in turns: each once a round, and every round starts with another one.

    Calls are warm when they come here: whoever times them has run each before. There are `rounds` of them, fewer
    where `seconds` are over before, but at `least` that many.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began, names = time.perf_counter(), list(calls)
    for turn in range(max(rounds, least)):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(once(calls[name], device))
    return {name: summary(times) for name, times in taken.items()}


def once(call: Callable[[], object], device: str) -> float:
    """The seconds of one call."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def summary(times: list[float]) -> Timing:
    """Median and spread of what calls took."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(middle, (high - low) / middle)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
