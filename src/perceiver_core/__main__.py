"""Commands: `python -m perceiver_core costs`, `python -m perceiver_core convert`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from perceiver_core.reads import measure
from perceiver_core.reads.costs import USUAL
from perceiver_core.checkpoints.convert import NUMERICS, TARGETS, Plan, convert
from perceiver_core.checkpoints.origin import KINDS


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m perceiver_core", description="Commands of perceiver-core.")
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("costs", help="measure what the cost model of reads asks of this machine, in a minute")
    costs.add_argument("--device", default="cpu", help="cpu or a CUDA GPU (default: %(default)s)")
    costs.set_defaults(run=_costs)
    _add_convert(commands.add_parser("convert", help="write a model of another library as one of this, or the reverse"))
    options = parser.parse_args()
    options.run(parser, options)


def _costs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Prints what was measured beside what is used, and the call that makes a model use it."""
    device = options.device.split(":")[0]
    if device not in USUAL or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where PyTorch finds a GPU; got {options.device}")
    found = measure.costs(device=options.device)
    print(f"{'':16} {'measured':>10} {'in use':>10}")  # noqa: T201 (it is a command)
    for name, value in asdict(found).items():
        print(f"{name:16} {value:10.3g} {getattr(USUAL[device], name):10.3g}")  # noqa: T201
    numbers = ", ".join(f"{name}={value:.3g}" for name, value in asdict(found).items())
    print(f"\npaths.use(model, reads.Auto(costs=reads.Machine({numbers})))")  # noqa: T201


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a file, a folder, or owner/name on the Hugging Face hub")
    command.add_argument("destination", type=Path, help="a folder that is not there yet, or empty")
    command.add_argument("--from", dest="kind", choices=KINDS, help="whose model it is (default: what it looks like)")
    command.add_argument("--to", dest="target", choices=TARGETS, default="perceiver-core", help="default: %(default)s")
    command.add_argument("--numerics", choices=NUMERICS, help="what the model computes (default: as its source does)")
    command.add_argument(
        "--arguments", type=_arguments, default={}, metavar="JSON",
        help="what the source does not tell, as JSON or the path of a JSON file: of perceiver-pytorch's constructor, "
        "or of transformers' configuration",
    )  # fmt: skip
    command.add_argument("--check", action="store_true", help="run the original beside ours; write if they agree")
    command.set_defaults(run=_convert)


def _arguments(text: str) -> dict[str, Any]:
    """JSON, or what is in a file of it."""
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, or the path of a file of one: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object; got a {type(found).__name__}")
    return found


def _convert(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Converts, and says how far apart the outputs are; status 1 where too far, 2 where it cannot be done."""
    plan = Plan(**{name: value for name, value in vars(options).items() if name in Plan._fields})
    try:
        difference = convert(plan)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if difference is not None:
        print(f"largest difference from the original: {difference:.3g} standard deviations of its output")  # noqa: T201
        if not difference <= plan.tolerance:
            sys.exit(f"that is above {plan.tolerance:g}, so nothing was written")
    print(f"written: {options.destination}")  # noqa: T201


if __name__ == "__main__":
    main()
