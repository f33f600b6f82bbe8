"""Copy of the results of a run to `examples/akoa/weights`, which is part of the repository.

make akoa && python -m examples.akoa.ship

The exit code is 0 if all was copied, 2 if there is nothing to copy, and 130 or 143 after an interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

from examples.akoa.driver import WEIGHTS
from examples.akoa.evaluation import results
from examples.akoa.training.run_record import RECORD, check_weights
from examples.akoa.training.run_record import WEIGHTS as TRAINED
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import output_folder
from examples.common.terminal import printable
from perceiver_core import load, save
from perceiver_core.atomic_files import write_atomically

MAX_BYTES = 2 * 2**20  # of the weights


def ship(run: Path, target: Path) -> list[Path]:
    """Replace the files of `target` by those of a run.

    Returns:
        Paths of the written files.

    Raises:
        FileNotFoundError: The run has no report, or lacks other results.
        ValueError: The weights are larger than 2 MiB, the report is not finished, or files are of several runs.
    """
    names = [TRAINED, results.TEXT, results.REPORT, RECORD, results.PREDICTIONS]
    if missing := [name for name in names if not (run / name).exists()]:
        raise FileNotFoundError(f"{run} has no {', '.join(missing)}; run `make akoa` to its end first")
    size = sum(path.stat().st_size for path in (run / TRAINED).glob("*.safetensors"))
    if size > MAX_BYTES:
        raise ValueError(f"weights of {size:,} bytes do not ship; the limit is {MAX_BYTES:,}. Train a smaller model")
    with output_folder(run):  # so that no command replaces its files meanwhile
        model = load(run / TRAINED)
        check_weights(run, model)
        results.check_look(run, model)
        if not results.is_complete(run):
            raise ValueError(f"{run / results.TEXT} is not that of its {results.REPORT}; run `make akoa` to its end")
        target.mkdir(parents=True, exist_ok=True)
        save(model, target)
        files = [*(run / name for name in names[1:]), *sorted(run.glob("*.png"))]
        write_atomically({target / path.name: path.read_bytes() for path in files})
    return [target / name for name in ("config.json", "model.safetensors", *(path.name for path in files))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = ArgumentParser(
        prog="python -m examples.akoa.ship", description="Copy the results of a run to the folder that ships."
    )
    parser.add_argument("--run", type=Path, default=Path("runs/akoa"), help="folder of the run (%(default)s)")
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="folder that ships (%(default)s)")
    args = parser.parse_args(argv)
    for path in ship(args.run, args.to):
        print(printable(path))


if __name__ == "__main__":
    sys.exit(main())
