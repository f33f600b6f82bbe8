"""Command line: `python -m benchmarks [names] [--toy] [--device cuda] [--only text] [--seconds n] [--out folder]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import attention, choice, compilation, generation, machine, measurement, models, read, report, scaling
from benchmarks.comparison import Setting


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
    options, failed = _options(), []
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
        print("", report.table(rows), "", *content["notes"], f"\nwritten to {path}\n", sep="\n", flush=True)
        if importlib.util.find_spec("matplotlib"):
            draw = getattr(benchmark.module, "plot", partial(report.bars, title=benchmark.module.TITLE))
            draw(rows, path.with_suffix(".png"))
        failed += [f"{name}: {text}" for text in report.failures(rows)]
    if failed:
        sys.exit("\n".join(["could not be measured:", *failed]))


def measure(benchmark: Benchmark, path: Path, content: dict[str, Any], options: argparse.Namespace) -> None:
    """Run a benchmark within its time; add rows and notes to the content and write it as soon as they are measured."""
    seconds = options.seconds or (benchmark.cuda if options.device.startswith("cuda") else benchmark.cpu)
    setting = Setting(options.toy, options.device, options.only, time.monotonic() + seconds)
    try:
        with measurement.time_limit(seconds):
            for found in benchmark.module.run(setting):
                content["notes" if isinstance(found, str) else "rows"].append(found)
                print(found if isinstance(found, str) else report.line(found), flush=True)
                report.save(path, content)
    except measurement.OutOfTimeError:
        content["notes"].append(f"did not end within {seconds:.0f} s; the comparison that was under way is missing")
    except KeyboardInterrupt:
        content["notes"].append("interrupted; the comparison that was under way is missing")
        raise
    except Exception as error:
        traceback.print_exc()
        content["rows"].append({"candidate": "all", "note": report.FAILED + report.describe_error(error)})
    finally:
        report.save(path, content)


def _options() -> argparse.Namespace:
    listed = [
        f"  {name:<10} {each.cpu:5.0f} s {each.cuda:5.0f} s  {(each.module.__doc__ or '').splitlines()[0]}"
        for name, each in BENCHMARKS.items()
    ]
    parser = argparse.ArgumentParser(
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
    main()
