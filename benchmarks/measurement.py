"""Time and peak memory of calls, limits of time, and calls in a fresh process.

Peak memory is what a call needs beyond weights and inputs, its results included. On the CPU it is the highest resident
memory of a fresh process during the call, minus the resident memory just before it. Linux lets a process reset its
highest resident memory; elsewhere the result is the growth of the process's lifelong peak in the first call, which is
too small if the setup had used more than it kept.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import describe_error

SHORTEST = 1e-3  # seconds between two events
LEAST_ROUNDS = 3
# Modules that a fork server imports once for all its children; importing them starts no threads.
IMPORTS = ["torch", "perceiver_core", "transformers.models.perceiver.modeling_perceiver"]
PROCESS = Path("/proc/self")


class Timing(NamedTuple):
    """Median and spread of the times of one candidate."""

    median: float  # seconds
    spread: float  # interquartile range / median


class Probe(NamedTuple):
    """Time and peak memory of a call in a fresh process."""

    seconds: float
    peak: float  # bytes


class OutOfTimeError(BaseException):
    """A time limit has passed. It is no `Exception`, so that handlers of failures do not catch it."""


class ProcessError(Exception):
    """A process failed; the message describes its error."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block once the time has passed, between two operations of Python.

    Limits may be nested. Without interval timers (on Windows) there is no limit.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s have passed")

    previous, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - start), 1e-3))


def in_process(function: Callable[..., Any], *arguments: object, seconds: float) -> Any:
    """Call a function in a process of its own, which sees nothing that ran before and is killed after some seconds.

    Function, arguments and result have to be picklable. The process is forked from a server that has only imported
    modules, where the system has fork servers, and started anew elsewhere.

    Raises:
        ProcessError: the function has raised, or the process has died.
        TimeoutError: the process did not end in time.
    """
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(IMPORTS)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, torch.get_num_threads(), function, arguments))
    process.start()
    sender.close()  # otherwise the death of the process would not end `poll`
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"did not end within {seconds:.0f} s")
        result, error = receiver.recv()
        process.join(10)
    except EOFError:
        process.join()
        raise ProcessError(f"the process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise ProcessError(error)
    return result


def _send_result(sender: Connection, threads: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        message = function(*arguments), None
    except Exception as error:
        message = None, describe_error(error)
    sender.send(message)


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, device: str, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time warm calls in turn: each once a round (on CUDA: `calls_per_sample` times), starting with another each round.

    There are fewer `rounds` if `seconds` pass before their end, but at least `LEAST_ROUNDS`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: calls_per_sample(call, device) for name, call in calls.items()}
    start, names = time.perf_counter(), list(calls)
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(once(calls[name], device, counts[name]))
    return {name: summary(own) for name, own in times.items()}


def calls_per_sample(call: Callable[[], object], device: str) -> int:
    """Return how many calls to time together: one; on CUDA as many as take a millisecond, as a power of two."""
    count = 1
    while device.startswith("cuda") and count * once(call, device, count) < SHORTEST:
        count *= 2
    return count


def once(call: Callable[[], object], device: str, count: int = 1) -> float:
    """Return the seconds of one call, measured over `count` calls in a row; on CUDA by events, the GPU's own clock."""
    synchronize = (lambda: None) if device == "cpu" else torch.accelerator.synchronize
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.startswith("cuda") else []
    synchronize()
    for event in events[:1]:
        event.record()
    start = time.perf_counter()
    for _ in range(count):
        call()
    for event in events[1:]:
        event.record()
    synchronize()
    return (events[0].elapsed_time(events[1]) / 1000 if events else time.perf_counter() - start) / count


def summary(times: list[float]) -> Timing:
    """Return the median and the spread of some times."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(middle, (high - low) / middle)


def peak_on_cuda(call: Callable[[], object]) -> float:
    """Return the bytes that a call needs beyond those that are allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def probe(setup: Callable[[str], Any], call: Callable[[Any], object]) -> Probe:
    """Measure `call(setup("cpu"))`; of a call that takes less than 2 s the second one, which is warm."""
    state = setup("cpu")
    found = _measured(call, state)
    return _measured(call, state) if found.seconds < 2 and (PROCESS / "clear_refs").exists() else found


def _measured(call: Callable[[Any], object], state: Any) -> Probe:
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # freed memory goes back to the system; otherwise the call could reuse it without being noticed
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # the highest resident memory becomes the present one
    before, start = _memory("VmRSS"), time.perf_counter()
    result = call(state)
    seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
    del result
    return Probe(seconds, peak)


def _memory(name: str) -> float:
    """Return an entry of Linux's process status in bytes; elsewhere the lifelong peak."""
    with suppress(OSError):
        if match := re.search(rf"^{name}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE):
            return 1024.0 * int(match[1])
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
