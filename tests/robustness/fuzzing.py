"""Runs random cases in worker processes and logs their outcomes, so that an interrupted run can be continued.

    python -m tests.robustness.fuzzing                       # all fuzzers, with the numbers of cases in FUZZERS
    python -m tests.robustness.fuzzing compositions --cases 500 --seed 7 --log runs/fuzz

Case number i of a fuzzer has the seed `seed + i`. It either returns a description of an accepted outcome, such as
"equal" or "refused: ValueError", or it escapes: it raises another error, ends the process, or exceeds the time limit.
The log has one line for each case. Cases that are in the log are not run again. The exit code is 0 if no case escaped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

# Module of each fuzzer, which has a function `run_case(seed, folder) -> outcome`, and its number of cases.
FUZZERS = {
    "arguments": ("tests.robustness.arguments", 31_000),
    "compositions": ("tests.robustness.compositions", 10_000),
    "damaged_files": ("tests.robustness.damaged_files", 5_000),
    "kills": ("tests.robustness.kills", 1_000),
}
ESCAPE = "escape"
TIME_LIMIT = 120.0  # seconds for one case


class Worker(NamedTuple):
    """Process that runs cases, and the connection that its seeds and outcomes are sent through."""

    process: multiprocessing.process.BaseProcess
    connection: Connection


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.fuzzing", description="Run random cases.")
    parser.add_argument("fuzzers", nargs="*", help=f"fuzzers to run, of {', '.join(FUZZERS)} (default: all)")
    parser.add_argument("--cases", type=int, help="number of cases of each fuzzer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case (%(default)s)")
    parser.add_argument("--log", type=Path, default=Path("runs/fuzz"), help="folder of the logs (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes (%(default)s)")
    options = parser.parse_args(argv)
    if unknown := set(options.fuzzers) - set(FUZZERS):
        parser.error(f"fuzzers must be of {', '.join(FUZZERS)}; got {', '.join(sorted(unknown))}")
    if options.cases is not None and options.cases < 1:
        parser.error(f"--cases must be at least 1; got {options.cases}")
    options.log.mkdir(parents=True, exist_ok=True)
    escapes = 0
    for name in options.fuzzers or FUZZERS:
        module, cases = FUZZERS[name]
        seeds = range(options.seed, options.seed + (cases if options.cases is None else options.cases))
        outcomes = run(module, seeds, options.log / f"{name}.jsonl", options.workers)
        print(f"{name}: {sum(outcomes.values()):,} cases from seed {options.seed}")
        for outcome, count in outcomes.most_common(20):
            print(f"  {count:7,}  {outcome}")
        escapes += sum(count for outcome, count in outcomes.items() if outcome.startswith(ESCAPE))
    print(f"{escapes} escapes")
    return int(escapes > 0)


def run(module: str, seeds: range, log: Path, workers: int) -> Counter[str]:
    """Run the cases that are not in the log yet, and count the outcomes of all cases, those in the log included."""
    logged = {entry["seed"]: entry["outcome"] for entry in _entries(log) if entry["seed"] in seeds}
    outcomes = Counter(logged.values())
    start = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        for seed, outcome, details in outcomes_of(module, [seed for seed in seeds if seed not in logged], workers):
            outcomes[outcome] += 1
            file.write(
                json.dumps({"seed": seed, "outcome": outcome, **({"details": details} if details else {})}) + "\n"
            )
            file.flush()
            if outcome.startswith(ESCAPE):
                print(f"{module}, seed {seed}: {outcome}\n{details}", flush=True)
            elif (total := sum(outcomes.values())) % 500 == 0:
                print(f"{module}: {total:,} cases, {time.perf_counter() - start:.0f} s", flush=True)
    return outcomes


def _entries(log: Path) -> Iterator[dict[str, object]]:
    """Parse the lines of a log. The last line may be incomplete if the run was killed."""
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


def outcomes_of(module: str, seeds: list[int], num_workers: int) -> Iterator[tuple[int, str, str]]:
    """Run cases in worker processes. Return the seed, outcome and details of each, in the order in which they end."""
    pending = iter(seeds)
    running: dict[Connection, tuple[Worker, int, float]] = {}

    def start(worker: Worker) -> None:
        if (seed := next(pending, None)) is None:
            worker.connection.send(None)
            worker.process.join()
        else:
            worker.connection.send(seed)
            running[worker.connection] = worker, seed, time.monotonic()

    for _ in range(min(num_workers, len(seeds))):
        start(_new_worker(module))
    while running:
        ready = set(wait(list(running), timeout=1.0))
        for connection, (worker, seed, begin) in list(running.items()):
            late = time.monotonic() - begin > TIME_LIMIT
            if connection not in ready and not late:
                continue
            del running[connection]
            try:
                if connection not in ready:
                    worker.process.kill()
                    raise TimeoutError
                outcome, details = connection.recv()
            except (EOFError, OSError) as error:
                worker.process.join()
                end = "no result in time" if isinstance(error, TimeoutError) else "the process ended"
                outcome, details = f"{ESCAPE}: {end}", f"exit code {worker.process.exitcode}"
                worker = _new_worker(module)
            yield seed, outcome, details
            start(worker)


def _new_worker(module: str) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(module, theirs), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def _work(module: str, connection: Connection) -> None:
    """Run the cases whose seeds arrive, until None arrives."""
    import torch

    torch.set_num_threads(1)
    run_case = importlib.import_module(module).run_case
    while (seed := connection.recv()) is not None:
        connection.send(outcome_of(run_case, seed))


def outcome_of(run_case: Callable[[int, Path], str], seed: int) -> tuple[str, str]:
    """Run one case in an empty folder. Return its outcome, and the traceback if it escaped."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run_case(seed, Path(folder)), ""
        except Exception as error:
            return f"{ESCAPE}: {type(error).__name__}: {error}".splitlines()[0][:200], traceback.format_exc()


if __name__ == "__main__":
    sys.exit(main())
