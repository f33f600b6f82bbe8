"""Runs the benchmarks: `python -m benchmarks [names] [--toy] [--device cuda] [--out folder]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import attention, choice, compilation, machine, models, read, report, routes, scaling
from benchmarks.contest import Setting

# Each is a module with a line of documentation, `run` and `plot`.
BENCHMARKS: dict[str, ModuleType] = {
    "attention": attention,
    "read": read,
    "choice": choice,
    "routes": routes,
    "models": models,
    "scaling": scaling,
    "compile": compilation,
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs what the command line names; prints each table, writes it as JSON, and draws it."""
    options = _options()
    described = machine.description(options.device)
    ceilings = machine.ceilings(options.device, toy=options.toy)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"\nceilings\n\n{report.table([ceilings])}\n")
    setting = Setting(options.toy, options.device)
    for name in options.names or BENCHMARKS:
        print(f"{name}\n", flush=True)
        results = BENCHMARKS[name].run(setting)
        for text in (report.table(results.rows), "", *results.notes):
            print(text)
        path = report.save(name, results, machine=described, ceilings=ceilings, folder=options.out)
        BENCHMARKS[name].plot(results.rows, path.with_suffix(".png"))
        print(f"\nwritten to {path} and {path.with_suffix('.png').name}\n", flush=True)


def _options() -> argparse.Namespace:
    listed = [f"  {name:<10} {(module.__doc__ or '').splitlines()[0]}" for name, module in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(["benchmarks:", *listed, "", "What each figure means is in benchmarks/README.md."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; all unless given")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing")
    parser.add_argument("--device", default="cpu", help="a PyTorch device (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: benchmarks/results)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"no device {options.device}: PyTorch finds no CUDA GPU")
    return options


if __name__ == "__main__":
    main()
