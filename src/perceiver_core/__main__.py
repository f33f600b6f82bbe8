"""Commands: `python -m perceiver_core costs`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from perceiver_core.blocks import measure
from perceiver_core.blocks.costs import USUAL, Costs


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m perceiver_core", description="Commands of perceiver-core.")
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("costs", help="measure what the cost model of reads asks of this machine, in a minute")
    costs.add_argument("--device", default="cpu", help="cpu or a CUDA GPU (default: %(default)s)")
    options = parser.parse_args()
    device = options.device.split(":")[0]
    if device not in USUAL or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where PyTorch finds a GPU; got {options.device}")
    _costs(options.device, USUAL[device])


def _costs(device: str, usual: Costs) -> None:
    """Prints what was measured beside what is used, and the call that makes a model use it."""
    found = measure.costs(device=device)
    print(f"{'':16} {'measured':>10} {'in use':>10}")  # noqa: T201 (it is a command)
    for name, value in asdict(found).items():
        print(f"{name:16} {value:10.3g} {getattr(usual, name):10.3g}")  # noqa: T201
    numbers = ", ".join(f"{name}={value:.3g}" for name, value in asdict(found).items())
    print(f"\npaths.use(model, paths.Cheapest(costs=paths.Costs({numbers})))")  # noqa: T201


if __name__ == "__main__":
    main()
