"""The whole example, from nothing to a report: what `make akoa` runs.

    python -m examples.akoa.demo --out runs/akoa          # minutes
    python -m examples.akoa.demo --toy                    # well under one; the figures mean nothing

Draws a phantom of 101 patients (data/phantom), writes its labels, trains, looks at the test set once,
and asks the driver about a few held-out pictures. Steps that are done are not done again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.akoa import driver, generate_labels, phantom, train
from examples.akoa.labels import read_labels

# The phantom plants one file that is cut short; anything else that is found must stop the demo.
_PLANTED = "unreadable"


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    name: str
    patients: int
    slices: int
    training: tuple[str, ...]


FULL = Scale("phantom", patients=101, slices=phantom.SLICES, training=())
TOY = Scale("phantom-toy", patients=10, slices=8, training=("--epochs", "2", "--batch", "32", "--size", "32"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or the exit code of the step that failed."""
    parser = argparse.ArgumentParser(prog="python -m examples.akoa.demo", description="Phantom to report.")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/akoa; runs/akoa-toy with --toy)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where phantoms are kept (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the phantom, split and training (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="a handful of patients, two epochs")
    args = parser.parse_args(argv)
    scale = TOY if args.toy else FULL
    out = args.out or Path("runs", "akoa-toy" if args.toy else "akoa")
    start = time.perf_counter()
    try:
        code = demo(scale, args.data / scale.name, out, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'failed' if code else 'done'} after {time.perf_counter() - start:.0f} s")
    return code


def demo(scale: Scale, folder: Path, out: Path, seed: int) -> int:
    """Phantom, labels, training and report, then the driver.

    Returns:
        0, or the exit code of the step that failed.
    """
    say(f"1  a phantom of {scale.patients} patients in {folder}")
    written = phantom.write(folder, patients=scale.patients, slices=scale.slices, seed=seed, progress=True)
    print(f"{written:,} files written" if written else "there already")
    pictures, labels = folder / phantom.FOLDER, folder / "labels.csv"
    say(f"2  labels, split by patient, in {labels}")
    if written or not labels.exists():
        asked = ["--data", str(pictures), "--out", str(labels), "--seed", str(seed), "--allow", _PLANTED]
        if code := generate_labels.main(asked):
            return code
    else:
        print("there already")
    say(f"3  training, and one look at the test set, in {out}")
    asked = ["--data", str(pictures), "--labels", str(labels), "--out", str(out), "--seed", str(seed)]
    if code := train.main([*asked, *scale.training, *(["--resume"] if (out / "run.json").exists() else [])]):
        return code
    say("4  the driver, on pictures of patients that were held out")
    if code := driver.main([*map(str, _held_out(labels, pictures)), "--weights", str(out / "weights")]):
        return code
    say(f"pictures  {pictures}\nmodel     {out / 'weights'}\nreport    {out / 'report.md'}")
    return 0


def say(text: str) -> None:
    """Print a heading, at once."""
    print(f"\n{text}", flush=True)


def _held_out(labels: Path, pictures: Path, count: int = 4) -> list[Path]:
    """Test pictures of `count` knees, as many as there are, from the middle of their volumes."""
    rows = [row for row in read_labels(labels) if row.split == "test"]
    middle = sorted({row.slice for row in rows})[len({row.slice for row in rows}) // 2]
    knees = {(row.patient, row.side): pictures / row.image for row in rows if row.slice == middle}
    return list(knees.values())[:count]


if __name__ == "__main__":
    sys.exit(main())
