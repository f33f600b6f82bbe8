"""Command-line interface, `python -m perceiver_core`, with the commands `costs` and `convert`.

The exit code is 0 after success, 1 if `convert --check` finds a difference, 2 for invalid arguments and input, and 130
or 143 after an interruption by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch

from perceiver_core.error_messages import printable
from perceiver_core.interop.conversion import FORMATS, NUMERICS, TARGETS, TOLERANCE, convert
from perceiver_core.reads.calibration import calibrate
from perceiver_core.reads.machine import DEFAULTS
from perceiver_core.registry import Json


class _Parser(argparse.ArgumentParser):
    """Parser whose errors contain no control characters, such as those of an unknown argument."""

    def error(self, message: str) -> NoReturn:
        """Print an error and exit with code 2."""
        super().error(printable(message))


def main() -> None:
    """Parse the command line and run the selected command."""
    parser = _Parser(prog="python -m perceiver_core", description="Commands of perceiver-core.")
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("costs", help="measure the cost model of reads on this machine, in a minute")
    costs.add_argument("--device", default="cpu", help="cpu or a CUDA GPU (default: %(default)s)")
    costs.set_defaults(run=_costs)
    converts = commands.add_parser("convert", help="write a model of another library as one of this, or the reverse")
    converts.add_argument("source", help="a file, a folder, or owner/name on the Hugging Face hub")
    converts.add_argument("destination", type=Path, help="a folder that does not exist yet, or is empty")
    converts.add_argument(
        "--from", dest="source_format", choices=FORMATS, help="format of the source (default: detected)"
    )
    converts.add_argument("--to", dest="target", choices=TARGETS, default="perceiver-core", help="default: %(default)s")
    converts.add_argument("--numerics", choices=NUMERICS, help="numerics of the model (default: those of its source)")
    converts.add_argument(
        "--arguments", type=_arguments, default={}, metavar="JSON",
        help="values that the source does not contain, as JSON or the path of a JSON file: of perceiver-pytorch's "
        "constructor, or of transformers' configuration",
    )  # fmt: skip
    converts.add_argument("--check", action="store_true", help="run both models; write only if the outputs agree")
    converts.set_defaults(run=_convert)
    options = parser.parse_args()
    options.run(parser, options)


def _costs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Measure the constants of the cost model. Print the measured and default values, and code to set the former."""
    device = options.device.split(":")[0]
    if device not in DEFAULTS or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where PyTorch finds a GPU; got {options.device}")
    try:
        torch.empty(0, device=options.device)
    except RuntimeError as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    found = calibrate(device=options.device)
    print(f"{'':16} {'measured':>10} {'in use':>10}")  # noqa: T201 (command-line output)
    for name, value in asdict(found).items():
        print(f"{name:16} {value:10.3g} {getattr(DEFAULTS[device], name):10.3g}")  # noqa: T201
    numbers = ", ".join(f"{name}={value:.3g}" for name, value in asdict(found).items())
    print(f"\nreads.set_strategy(model, reads.Auto(machine=reads.Machine({numbers})))")  # noqa: T201


def _arguments(text: str) -> dict[str, Json]:
    """Return the JSON object in `text`. If `text` does not start with "{", it is the path of a JSON file."""
    try:
        arguments = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, or the path of a file of one: {error}") from error
    if not isinstance(arguments, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object; got a {type(arguments).__name__}")
    return arguments


def _convert(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Convert a model. With `--check`, also print the largest difference between the outputs of the two models.

    The exit status is 1 if this difference exceeds `TOLERANCE`, and 2 if the conversion fails.
    """
    names = ("source_format", "target", "numerics", "arguments", "check")
    try:
        difference = convert(options.source, options.destination, **{name: getattr(options, name) for name in names})
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if difference is not None:
        print(f"largest difference from the original: {difference:.3g} standard deviations of its output")  # noqa: T201
        if not difference <= TOLERANCE:
            sys.exit(f"that is above {TOLERANCE:g}, so nothing was written")
    print(f"written: {printable(str(options.destination))}")  # noqa: T201


def _exit_code() -> int:
    """Run `main` and return the exit code: 0, or 130 and 143 after Ctrl-C and SIGTERM, or 141 if stdout was closed."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:  # None if it was closed before Python started
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the same command again", file=sys.stderr)  # noqa: T201
        return 128 + (received or [signal.SIGINT])[0]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again when it ends
        return 128 + 13  # SIGPIPE
    return 0


if __name__ == "__main__":
    sys.exit(_exit_code())
