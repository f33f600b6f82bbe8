"""The whole example, from generated data to a report; `make akoa` runs it.

    python -m examples.akoa.demo --out runs/akoa          # minutes
    python -m examples.akoa.demo --toy                    # less than a minute; the results are meaningless

The steps are: draw a phantom of 101 patients (data/phantom), write its labels, train, evaluate the test set once, and
classify a few held-out images with the driver. Finished steps are not repeated: after an interruption, the same command
continues.

The exit code is that of the step that failed, 0 if none did, and 130 or 143 after an interruption.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

from examples.akoa import driver, generate_labels, train
from examples.akoa.dataset.labels import read_labels
from examples.akoa.phantom import dataset as phantom
from examples.common import parse
from examples.common.command import ArgumentParser, run_command
from examples.common.terminal import printable

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
    """Run the command and return its exit code."""
    return run_command(lambda: execute(argv))


def execute(argv: Sequence[str] | None = None) -> int:
    """Run all steps. Returns 0, or the exit code of the step that failed."""
    parser = ArgumentParser(prog="python -m examples.akoa.demo", description="Phantom to report.")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/akoa; runs/akoa-toy with --toy)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the phantoms (%(default)s)")
    parser.add_argument(
        "--seed", type=parse.seed, default=0, help="seed of the phantom, split and training (%(default)s)"
    )
    parser.add_argument("--toy", action="store_true", help="ten patients and two epochs")
    args = parser.parse_args(argv)
    scale = TOY if args.toy else FULL
    out = args.out or Path("runs", "akoa-toy" if args.toy else "akoa")
    start = time.perf_counter()
    code = demo(scale, args.data / scale.name, out, args.seed)
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
        if code := generate_labels.execute(arguments):
            return code
    else:
        print("complete already")
    print_heading(f"3  training, and one evaluation of the test set, in {out}")
    arguments = ["--data", str(images), "--labels", str(labels), "--out", str(out), "--seed", str(seed)]
    train.execute([*arguments, *scale.training, "--resume"])
    print_heading("4  the driver, on images of held-out patients")
    if code := driver.execute([*map(str, _held_out(labels, images)), "--weights", str(out / "weights")]):
        return code
    print_heading(f"images    {images}")
    print(f"model     {printable(out / 'weights')}\nreport    {printable(out / 'report.md')}")
    return 0


def print_heading(text: str) -> None:
    """Print a heading, escaped and without buffering."""
    print(f"\n{printable(text)}", flush=True)


def _held_out(labels: Path, images: Path, num_knees: int = 4) -> list[Path]:
    """Test images of up to `num_knees` knees, from the middle of their volumes."""
    rows = [row for row in read_labels(labels) if row.split == "test"]
    middle = sorted({row.slice for row in rows})[len({row.slice for row in rows}) // 2]
    knees = {(row.patient, row.side): images / row.image for row in rows if row.slice == middle}
    return list(knees.values())[:num_knees]


if __name__ == "__main__":
    sys.exit(main())
