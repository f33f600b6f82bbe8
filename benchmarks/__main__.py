"""Command line: `python -m benchmarks [names] [--toy] [--device cuda] [--only text] [--seconds n] [--out folder]`.

The exit code is 0 if all was measured, 1 if something could not be, 2 for invalid arguments or files, and 130 or 143
after an interruption; what was measured is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch

from benchmarks import attention, choice, compilation, generation, machine, measurement, models, read, report, scaling
from benchmarks.comparison import Setting
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import output_folder
from examples.common.terminal import printable


class Benchmark(NamedTuple):
    """A module with `TITLE` and `run(setting)`, which yields rows and notes, and the seconds that it may take."""

    module: ModuleType
    cpu: float
    cuda: float


# On two cores all of them together end within 40 minutes. Time on a GPU is scarcer.
BENCHMARKS = {
    "read": Benchmark(read, cpu=340, cuda=200),
    "models": Benchmark(models, cpu=1000, cuda=120),
    "attention": Benchmark(attention, cpu=250, cuda=80),
    "choice": Benchmark(choice, cpu=120, cuda=60),
    "scaling": Benchmark(scaling, cpu=410, cuda=120),
    "compile": Benchmark(compilation, cpu=170, cuda=170),
    "generation": Benchmark(generation, cpu=60, cuda=60),
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the benchmarks that the command line names; failures are reported at the end, after all is written."""
    options = _options()
    with output_folder(options.out):
        failed = run(options)
    if failed:
        sys.exit("\n".join(["could not be measured:", *failed]))


def run(options: argparse.Namespace) -> list[str]:
    """Run the benchmarks, print and write their results, and return what could not be measured."""
    failed = []
    described = machine.description(options.device)
    ceilings = machine.ceilings(options.device, toy=options.toy)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"\nceilings\n\n{report.table([ceilings])}\n")
    for name in options.names or BENCHMARKS:
        print(f"{name}\n", flush=True)
        rows: list[report.Row] = []
        content = {"benchmark": name, "machine": described, "ceilings": ceilings, "rows": rows, "notes": []}
        path, benchmark = options.out / f"{name}.json", BENCHMARKS[name]
        measure(benchmark, path, content, options)
        print("", report.table(rows), "", *content["notes"], f"\nwritten to {printable(path)}\n", sep="\n", flush=True)
        if importlib.util.find_spec("matplotlib"):
            draw = getattr(benchmark.module, "plot", partial(report.bars, title=benchmark.module.TITLE))
            draw(rows, path.with_suffix(".png"))
        failed += [f"{name}: {text}" for text in report.failures(rows)]
    return failed


def measure(benchmark: Benchmark, path: Path, content: dict[str, Any], options: argparse.Namespace) -> None:
    """Run a benchmark within its time; add rows and notes to the content and write it as soon as they are measured."""
    seconds = options.seconds or (benchmark.cuda if options.device.startswith("cuda") else benchmark.cpu)
    setting = Setting(options.toy, options.device, options.only, time.monotonic() + seconds)
    try:
        with measurement.time_limit(seconds):
            for found in _results(benchmark, setting):
                content["notes" if isinstance(found, str) else "rows"].append(found)
                report.save(path, content)
                print(found if isinstance(found, str) else report.line(found), flush=True)
    except measurement.OutOfTimeError:
        content["notes"].append(f"did not end within {seconds:.0f} s; the comparison that was under way is missing")
    except KeyboardInterrupt:
        content["notes"].append("interrupted; the comparison that was under way is missing")
        raise
    finally:
        report.save(path, content)


def _results(benchmark: Benchmark, setting: Setting) -> Iterator[report.Row | str]:
    """Yield the rows and notes of a benchmark, and a row that names the error if it fails."""
    try:
        yield from benchmark.module.run(setting)
    except Exception as error:
        traceback.print_exc()
        yield {"candidate": "all", "note": report.FAILED + report.describe_error(error)}


def _options() -> argparse.Namespace:
    listed = [
        f"  {name:<10} {each.cpu:5.0f} s {each.cuda:5.0f} s  {(each.module.__doc__ or '').splitlines()[0]}"
        for name, each in BENCHMARKS.items()
    ]
    parser = ArgumentParser(
        prog="python -m benchmarks",
        epilog="\n".join(["benchmarks, and the time that each may take on a CPU and on a GPU:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing")
    parser.add_argument("--device", default="cpu", help="a PyTorch device (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="text", help="only sizes that contain this, as 'batch 32'")
    parser.add_argument("--seconds", type=float, default=0.0, help="time limit of each benchmark, in place of its own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: benchmarks/results)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"no device {options.device}: PyTorch finds no CUDA GPU")
    return options


if __name__ == "__main__":
    sys.exit(run_command(main, "the results so far are written; run the same command again"))
