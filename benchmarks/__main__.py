"""Runs the benchmarks: `python -m benchmarks [names] [--toy] [--device cuda] [--out folder]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import attention, timing

BENCHMARKS = {"attention": attention.run}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs what the command line names, prints each table and writes it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; all unless given")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs; the times mean nothing")
    parser.add_argument("--device", default="cpu", help="a PyTorch device (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        print(f"{name}\n")
        rows = BENCHMARKS[name](toy=options.toy, device=options.device)
        print(timing.table(rows))
        print(f"\nwritten to {timing.save(name, rows, device=options.device, folder=options.out)}\n")


if __name__ == "__main__":
    main()
