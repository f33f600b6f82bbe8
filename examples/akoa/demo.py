"""The whole example, from generated data to a report; `make akoa` runs it.

    python -m examples.akoa.demo --out runs/akoa          # minutes
    python -m examples.akoa.demo --toy                    # less than a minute; the results are meaningless

The steps are: draw a phantom of 101 patients (data/phantom), write its labels, train, evaluate the test set once, and
classify a few held-out images with the driver. Finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.akoa import driver, generate_labels, train
from examples.akoa.dataset.labels import read_labels
from examples.akoa.phantom import dataset as phantom

# The phantom contains one truncated file; any other problem must stop the demo.
_EXPECTED_PROBLEM = "unreadable"


@dataclass(frozen=True)
class Scale:
    """Size of the phantom and of the training."""

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
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the phantoms (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the phantom, split and training (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="ten patients and two epochs")
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
    """Write phantom and labels, train and evaluate, then run the driver.

    Returns:
        0, or the exit code of the step that failed.
    """
    print_heading(f"1  a phantom of {scale.patients} patients in {folder}")
    written = phantom.write(folder, patients=scale.patients, slices=scale.slices, seed=seed, progress=True)
    print(f"{written:,} files written" if written else "complete already")
    images, labels = folder / phantom.FOLDER, folder / "labels.csv"
    print_heading(f"2  labels, split by patient, in {labels}")
    if written or not labels.exists():
        arguments = ["--data", str(images), "--out", str(labels), "--seed", str(seed), "--allow", _EXPECTED_PROBLEM]
        if code := generate_labels.main(arguments):
            return code
    else:
        print("complete already")
    print_heading(f"3  training, and one evaluation of the test set, in {out}")
    arguments = ["--data", str(images), "--labels", str(labels), "--out", str(out), "--seed", str(seed)]
    if code := train.main([*arguments, *scale.training, *(["--resume"] if (out / "run.json").exists() else [])]):
        return code
    print_heading("4  the driver, on images of held-out patients")
    if code := driver.main([*map(str, _held_out(labels, images)), "--weights", str(out / "weights")]):
        return code
    print_heading(f"images    {images}\nmodel     {out / 'weights'}\nreport    {out / 'report.md'}")
    return 0


def print_heading(text: str) -> None:
    """Print a heading, without buffering."""
    print(f"\n{text}", flush=True)


def _held_out(labels: Path, images: Path, num_knees: int = 4) -> list[Path]:
    """Test images of up to `num_knees` knees, from the middle of their volumes."""
    rows = [row for row in read_labels(labels) if row.split == "test"]
    middle = sorted({row.slice for row in rows})[len({row.slice for row in rows}) // 2]
    knees = {(row.patient, row.side): images / row.image for row in rows if row.slice == middle}
    return list(knees.values())[:num_knees]


if __name__ == "__main__":
    sys.exit(main())
