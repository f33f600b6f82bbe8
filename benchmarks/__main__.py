"""Runs the benchmarks: `python -m benchmarks [names] [--toy] [--device cuda] [--only text] [--out folder]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import (
    attention,
    choice,
    compilation,
    cuda_attention,
    cuda_models,
    cuda_read,
    failures,
    generation,
    machine,
    models,
    read,
    report,
    routes,
    scaling,
)
from benchmarks.contest import Row, Setting

# Each is a module with a line of documentation, `run` and `plot`.
BENCHMARKS: dict[str, ModuleType] = {
    "attention": attention,
    "read": read,
    "choice": choice,
    "routes": routes,
    "models": models,
    "scaling": scaling,
    "compile": compilation,
    "generation": generation,
}
# On a GPU these have sizes and candidates of their own.
ON_CUDA: dict[str, ModuleType] = {"attention": cuda_attention, "read": cuda_read, "models": cuda_models}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs what the command line names; prints each table, writes it as JSON, and draws it.

    What fails is told of in the end, once everything else is measured and written.
    """
    options = _options()
    described = machine.description(options.device)
    ceilings = machine.ceilings(options.device, toy=options.toy)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"\nceilings\n\n{report.table([ceilings])}\n")
    failed = []
    for name in options.names or BENCHMARKS:
        print(f"{name}\n", flush=True)
        log = options.out / f"{name}.jsonl"
        log.unlink(missing_ok=True)
        setting = Setting(options.toy, options.device, options.only, log)
        benchmark = _benchmarks(options.device)[name]
        try:
            results = benchmark.run(setting)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name}: {failures.words(error)}")
            continue
        for text in (report.table(results.rows), "", *results.notes):
            print(text)
        path = report.save(name, results, machine=described, ceilings=ceilings, folder=options.out)
        log.unlink(missing_ok=True)
        _draw(benchmark, results.rows, path.with_suffix(".png"))
        print(f"\nwritten to {path}\n", flush=True)
        failed += [f"{name}: {text}" for text in failures.failed(results.rows)]
    if failed:
        sys.exit("\n".join(["could not be measured:", *failed]))


def _benchmarks(device: str) -> dict[str, ModuleType]:
    return BENCHMARKS | ON_CUDA if device.startswith("cuda") else BENCHMARKS


def _draw(benchmark: ModuleType, rows: list[Row], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("\nno picture: matplotlib is not installed")
    else:
        benchmark.plot(rows, path)


def _options() -> argparse.Namespace:
    listed = [f"  {name:<10} {(module.__doc__ or '').splitlines()[0]}" for name, module in BENCHMARKS.items()]
    on_cuda = [f"  {name:<10} {(module.__doc__ or '').splitlines()[0]}" for name, module in ON_CUDA.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(
            ["benchmarks:", *listed, "", "with --device cuda:", *on_cuda, "", "Figures: see benchmarks/README.md."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; all unless given")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing")
    parser.add_argument("--device", default="cpu", help="a PyTorch device (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="text", help="contests whose sizes say this, as 'batch 32'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: benchmarks/results)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"no device {options.device}: PyTorch finds no CUDA GPU")
    return options


if __name__ == "__main__":
    main()
