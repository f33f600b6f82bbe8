"""Commands: `python -m perceiver_core costs`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from perceiver_core.blocks import measure
from perceiver_core.blocks.costs import MEASURED


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m perceiver_core", description="Commands of perceiver-core.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("costs", help="measure what the cost model of reads asks of this machine, in a minute")
    parser.parse_args()
    _costs()


def _costs() -> None:
    """Prints what was measured beside what is used, and the call that makes a model use it."""
    found = measure.costs()
    print(f"{'':16} {'measured':>10} {'in use':>10}")  # noqa: T201 (it is a command)
    for name, value in asdict(found).items():
        print(f"{name:16} {value:10.3g} {getattr(MEASURED, name):10.3g}")  # noqa: T201
    numbers = ", ".join(f"{name}={value:.3g}" for name, value in asdict(found).items())
    print(f"\npaths.use(model, paths.Cheapest(costs=paths.Costs({numbers})))")  # noqa: T201


if __name__ == "__main__":
    main()
