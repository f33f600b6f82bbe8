"""Evaluation of a run on its test set, with a report of all results.

    python -m examples.akoa.evaluate --run runs/akoa --data data/phantom --labels labels.csv --again

Training evaluates the test set once. This command evaluates it again, with the weights in the folder of the run.
report.json counts these evaluations (looks at the test set), and `--again` is required if the folder has a report:
results are biased if choices were based on an earlier look. If a command was interrupted while it wrote the report of a
look, the report is finished without another look.

The exit code is 0 if the report was written, 2 for invalid arguments or files, and 130 or 143 after an interruption.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import numpy as np
from torch import nn

from examples.akoa.dataset.datamodule import KneeDataModule, Split
from examples.akoa.dataset.labels import SPLITS, Row, find_leaks
from examples.akoa.evaluation import baselines, metrics
from examples.akoa.evaluation.analysis import border_test, mirror_test, score_test_set
from examples.akoa.evaluation.baselines import LinearModel, border_only
from examples.akoa.evaluation.cross_validation import count_data
from examples.akoa.evaluation.figures import figure_names, read_history
from examples.akoa.evaluation.inference import predict
from examples.akoa.evaluation.metrics import Report
from examples.akoa.evaluation.predictions import LINEAR, LINEAR_MIRRORED, MAJORITY, MODELS, PERCEIVER
from examples.akoa.evaluation.report import format_estimate
from examples.akoa.evaluation.results import (
    check_look,
    count_looks,
    has_unfinished_report,
    write_look,
    write_presentation,
)
from examples.akoa.training.run_record import (
    WEIGHTS,
    check_rows,
    check_weights,
    read_record,
    trained_size,
    weights_digest,
)
from examples.common import parse
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import output_folder
from examples.common.terminal import printable
from perceiver_core import load


def evaluate_run(
    model: nn.Module,
    splits: Mapping[str, Split],
    out: Path,
    *,
    history: Path | None,
    seed: int = 0,
    command: str | None = None,
    progress: bool = False,
) -> Report:
    """Evaluate the test set and write report.json, report.md, predictions.csv and PNG files.

    Args:
        model: Module from images `b 1 h w` to one logit each, positive for right.
        splits: Splits `train` (which fits the baselines), `val` (which selects their penalty) and `test`.
        out: Folder of the run, created if necessary.
        history: Path of history.csv, for the training curves; None for no curves.
        seed: Seed of the bootstrap.
        command: Command that reproduces the report, which quotes it; None for the command of this module.
        progress: Show progress bars.

    Returns:
        Content of report.json.

    Raises:
        ValueError: A patient is in two splits, a split is missing or empty, the numbers of rows and images differ, or
            report.json in `out` cannot be read, so that looks cannot be counted.
        FileNotFoundError: The history does not exist.
    """
    check_splits(splits)
    looks = count_looks(out) + 1
    epochs = None if history is None else read_history(history)
    rows = {part: [replace(row, split=part) for row in splits[part].rows] for part in splits}
    linear_models = fit_baselines(splits, progress=progress)
    logits = {
        part: all_logits(model, linear_models, splits["train"], splits[part], progress=progress)
        for part in ("val", "test")
    }
    weights = bootstrap_weights(rows["test"], seed)
    report: Report = {
        "data": describe_data(splits),
        "command": command or evaluation_command(out, Path("DATA"), Path("LABELS")),
        "test_looked_at": looks,
        "seed": seed,
        "draws": metrics.DRAWS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **score_test_set(rows["test"], logits["test"], weights),
        "validation": metrics.score(rows["val"], logits["val"][PERCEIVER], bootstrap_weights(rows["val"], seed)),
        "mirror": mirror_test(model, splits["test"], logits["test"][PERCEIVER], weights),
        "border": border_test(model, linear_models, splits, logits["test"], weights),
        "linear": {name: fit.describe() for name, fit in linear_models.items()},
        "plots": {name: f"{name}.png" for name in figure_names(model, epochs)},
        "weights_sha256": weights_digest(model),
    }
    out.mkdir(parents=True, exist_ok=True)
    both = {name: np.concatenate([logits["val"][name], logits["test"][name]]) for name in MODELS}
    write_look(out, report, rows["val"] + rows["test"], both)
    return write_presentation(out, model, splits["test"], epochs)


def check_splits(splits: Mapping[str, Split]) -> None:
    """Check that splits do not leak patients, and that none is missing or empty.

    Raises:
        ValueError: As in `evaluate_run`.
    """
    missing = [part for part in SPLITS if part not in splits or not splits[part].rows]
    if missing or set(splits) - set(SPLITS):
        raise ValueError(f"splits: got {sorted(splits)}, need images in each of {list(SPLITS)}")
    for part, split in splits.items():
        if len(split.rows) != len(split.images):
            raise ValueError(f"splits: {part} has {len(split.rows)} rows for {len(split.images)} images")
    leaks, shown = find_leaks((row.patient, part) for part, split in splits.items() for row in split.rows)
    if leaks:
        raise ValueError(
            f"splits: {leaks} patients are in two splits ({shown}), so the test would not "
            "be independent of training; split by patient with examples.akoa.generate_labels"
        )


def fit_baselines(splits: Mapping[str, Split], *, progress: bool = False) -> dict[str, LinearModel]:
    """Fit linear models: on the images, on these and their mirror images, and on borders alone."""
    train, val = splits["train"], splits["val"]
    border = [baselines.transform_split(split, border_only) for split in (train, val)]
    return {
        LINEAR: baselines.fit_linear(train, val, mirrored=False, progress=progress),
        LINEAR_MIRRORED: baselines.fit_linear(train, val, mirrored=True, progress=progress),
        "linear_on_border": baselines.fit_linear(*border, mirrored=False, progress=progress),
    }


def all_logits(
    model: nn.Module, linear_models: Mapping[str, LinearModel], train: Split, split: Split, *, progress: bool
) -> dict[str, np.ndarray]:
    """Logits of each of `MODELS` for a split."""
    return {
        PERCEIVER: predict(model, split.images, progress=progress),
        LINEAR: linear_models[LINEAR].logits(split.images),
        LINEAR_MIRRORED: linear_models[LINEAR_MIRRORED].logits(split.images),
        MAJORITY: baselines.majority(train, len(split.rows)),
    }


def bootstrap_weights(rows: Sequence[Row], seed: int) -> metrics.Weights:
    """Bootstrap multiplicities of the patients of some rows."""
    return metrics.resample(len({row.patient for row in rows}), seed)


def describe_data(splits: Mapping[str, Split]) -> Report:
    """Kind of the data, size of the images, and counts of each split.

    Real patient numbers begin with 9, and those of the phantom never do.
    """
    real = {row.patient.startswith("9") for split in splits.values() for row in split.rows}
    kind = "mixed" if len(real) > 1 else "AKOA" if real == {True} else "phantom"
    return {
        "kind": kind,
        "picture": list(splits["test"].images.shape[-2:]),
        "splits": {part: count_data(splits[part].rows) for part in SPLITS},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m examples.akoa.evaluate",
        description="Evaluate the weights of a run on its test set; evaluations are counted.",
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of the run, which contains weights/")
    add("--data", type=Path, required=True, help="folder with the PNG files")
    add("--labels", type=Path, required=True, help="labels.csv that the run was trained on")
    add(
        "--fold",
        type=int,
        help="run of the cross-validation, if labels are in folds and run.json does not name it",
    )
    add("--seed", type=parse.seed, default=0, help="seed of the bootstrap (%(default)s)")
    add("--again", action="store_true", help="evaluate a test set again")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    if not (args.run / WEIGHTS).is_dir():
        raise ValueError(f"{args.run} contains no folder {WEIGHTS}/; give the folder of a finished training")
    with output_folder(args.run):
        report = _evaluate_folder(args)
    accuracy = report["models"][PERCEIVER]["slice"]["accuracy"]
    print(f"accuracy of test slices: {format_estimate(accuracy)}; the report is {printable(args.run / 'report.md')}")


def _evaluate_folder(args: argparse.Namespace) -> Report:
    model = load(args.run / WEIGHTS)
    check_weights(args.run, model)
    looks, unfinished = count_looks(args.run), has_unfinished_report(args.run, model)
    if looks and not unfinished and not args.again:
        check_look(args.run, model)
        raise ValueError(
            f"the test set of {args.run} was looked at before ({looks} so far); read {args.run / 'report.md'}, "
            "or evaluate it again with --again, which is counted"
        )
    size = trained_size(args.run / WEIGHTS, model)
    fold = read_record(args.run).get("fold") if args.fold is None else args.fold
    knees = KneeDataModule(data=args.data, labels=args.labels, size=size, fold=fold, augment=False)
    check_rows(args.run, knees.rows)
    history = args.run / "history.csv" if (args.run / "history.csv").exists() else None
    if unfinished:
        print(f"{printable(args.run)}: finishing the report of an interrupted command, without another look")
        return write_presentation(args.run, model, knees.split("test"), history and read_history(history))
    return evaluate_run(
        model,
        {part: knees.split(part) for part in SPLITS},
        args.run,
        history=history,
        seed=args.seed,
        command=evaluation_command(args.run, args.data, args.labels, fold),
        progress=True,
    )


def evaluation_command(run: Path, data: Path, labels: Path, fold: int | None = None) -> str:
    """Command that evaluates a run again."""
    parts = ["--run", str(run), "--data", str(data), "--labels", str(labels)]
    parts += [] if fold is None else ["--fold", str(fold)]
    return printable(f"python -m examples.akoa.evaluate {shlex.join(parts)} --again")


if __name__ == "__main__":
    sys.exit(main())
