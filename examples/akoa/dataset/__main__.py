"""Measurement of the share of a training step that the input pipeline takes.

python -m examples.akoa.dataset --data data/AKOA_Analysis --labels labels.csv
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import numpy as np
import torch
from torch.nn import functional as F

from examples.akoa.dataset.augmentation import augment, seeded_generator
from examples.akoa.dataset.datamodule import KneeDataModule, to_model_input
from examples.akoa.dataset.size_option import SizeAction
from examples.akoa.model import knee_model
from examples.common import parse
from examples.common.command import ArgumentParser, run_command


def measure(knees: KneeDataModule, num_batches: int) -> tuple[float, float]:
    """Median seconds to prepare a batch (index, scale, augment) and to train on it."""
    model, loader = knee_model(knees.size), knees.train_dataloader()
    optimizer = torch.optim.AdamW(model.parameters())
    input_times, train_times = [], []
    start = time.perf_counter()
    for step, (images, labels) in zip(range(num_batches), loader, strict=False):
        inputs, targets = augment(to_model_input(images), labels, seeded_generator(images.device, step))
        ready = time.perf_counter()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(model(inputs)[:, 0], targets))
        optimizer.step()
        optimizer.zero_grad()
        done = time.perf_counter()
        input_times.append(ready - start)
        train_times.append(done - ready)
        start = done
    return float(np.median(input_times)), float(np.median(train_times))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: execute(argv))


def execute(argv: Sequence[str] | None = None) -> None:
    """Run the measurements that are configured on the command line, and print the times.

    Raises:
        OSError: A file cannot be read.
        ValueError: The labels or the images are invalid.
    """
    parser = ArgumentParser(
        prog="python -m examples.akoa.dataset", description="Measure the share of a training step that the input takes."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the PNG files")
    parser.add_argument("--labels", type=Path, required=True, help="labels.csv of generate_labels")
    parser.add_argument(
        "--size", type=int, nargs="+", action=SizeAction, default=(64, 64), help="one number, or height width"
    )
    parser.add_argument("--batch", type=parse.count, default=64, help="images per batch (%(default)s)")
    parser.add_argument("--fold", type=int, help="run of the cross-validation, if the labels are split into folds")
    parser.add_argument("--batches", type=parse.count, default=40, help="number of batches to time (%(default)s)")
    args = parser.parse_args(argv)
    knees = KneeDataModule(labels=args.labels, data=args.data, size=args.size, batch=args.batch, fold=args.fold)
    start = time.perf_counter()
    knees.setup()
    seconds = time.perf_counter() - start
    input_time, train_time = measure(knees, args.batches)
    print(f"decoded {len(knees.rows):,} images in {seconds:.1f} s ({len(knees.rows) / seconds:,.0f} per second)")
    print(f"a batch of {args.batch}: {input_time * 1e3:.1f} ms to prepare, {train_time * 1e3:.1f} ms to train on")
    print(f"the input takes {input_time / (input_time + train_time):.1%} of a step")


if __name__ == "__main__":
    sys.exit(main())
