"""Copy of the results of a run to `examples/akoa/weights`, which is part of the repository.

make akoa && python -m examples.akoa.ship
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.akoa.driver import WEIGHTS
from examples.akoa.training.run_record import WEIGHTS as TRAINED

MAX_BYTES = 2 * 2**20  # of the weights


def ship(run: Path, target: Path) -> list[Path]:
    """Replace the files of `target` by those of a run.

    Returns:
        Paths of the written files.

    Raises:
        FileNotFoundError: The run has no report, or lacks other results.
        ValueError: The weights are larger than 2 MiB.
    """
    names = [TRAINED, "report.md", "report.json", "run.json", "predictions.csv"]
    if missing := [name for name in names if not (run / name).exists()]:
        raise FileNotFoundError(f"{run} has no {', '.join(missing)}; run `make akoa` to its end first")
    files = [*sorted((run / TRAINED).glob("*.*")), *(run / name for name in names[1:]), *sorted(run.glob("*.png"))]
    size = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    if size > MAX_BYTES:
        raise ValueError(f"weights of {size:,} bytes do not ship; the limit is {MAX_BYTES:,}. Train a smaller model")
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(path, target / path.name)) for path in files]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if there is nothing to ship."""
    parser = argparse.ArgumentParser(prog="python -m examples.akoa.ship", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/akoa"), help="folder of the run (%(default)s)")
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="folder that ships (%(default)s)")
    args = parser.parse_args(argv)
    try:
        for path in ship(args.run, args.to):
            print(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
