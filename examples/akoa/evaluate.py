"""Look at the test set, and write down all that it says.

    python -m examples.akoa.evaluate --run runs/akoa --data data/phantom --labels labels.csv --again

A run evaluates its test set by itself, once. This command does so again, with the weights in the
run's folder. report.json counts the looks, and a folder that has a report wants `--again`: each
look at a test set that is followed by a choice makes it less of a test.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from examples.akoa import baselines, metrics, predictions
from examples.akoa.baselines import Linear, border_only
from examples.akoa.data import Knees, Split
from examples.akoa.findings import border_test, figures, mirror_test
from examples.akoa.folds import count, summarize_folds
from examples.akoa.illustrate import draw, read_history
from examples.akoa.inference import predict
from examples.akoa.labels import SPLITS, Row, patients_in_several
from examples.akoa.predictions import LINEAR, LINEAR_MIRRORED, MAJORITY, MODELS, PERCEIVER
from examples.akoa.report import folds_markdown, markdown, show
from examples.akoa.runs import WEIGHTS, check_rows, read_record, trained_size
from perceiver_core import load

__all__ = ["evaluate_run", "folds_markdown", "predict", "regenerate", "summarize_folds"]

REPORT = "report.json"


def evaluate_run(
    model: nn.Module,
    splits: Mapping[str, Split],
    out: Path,
    *,
    history: Path | None,
    seed: int = 0,
    command: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Look at the test set and write report.json, report.md, predictions.csv and PNG files.

    Args:
        model: takes pictures `b 1 h w` and gives one logit each, positive = right.
        splits: `train` (which fits the baselines), `val` (which chooses their penalty), `test`.
        out: the folder of the run; made if it is not there.
        history: metrics.csv of Lightning's CSVLogger, for the curves of training; None for none.
        seed: of the bootstrap.
        command: what regenerates the report, as the report will say.
        progress: show bars.

    Returns:
        What report.json holds.

    Raises:
        ValueError: a patient stands in two splits, a split is missing or empty or has not as many
            rows as pictures, or report.json in `out` cannot be read, so that looks cannot be counted.
        FileNotFoundError: there is no such history.
    """
    check_splits(splits)
    looked = looked_at(out) + 1
    epochs = None if history is None else read_history(history)
    rows = {part: [replace(row, split=part) for row in splits[part].rows] for part in splits}
    linear = fit_baselines(splits, progress=progress)
    logits = {
        part: all_logits(model, linear, splits["train"], splits[part], progress=progress) for part in ("val", "test")
    }
    weights = draws_of(rows["test"], seed)
    report: dict[str, Any] = {
        "data": describe_data(splits),
        "command": command or regenerate(out, Path("DATA"), Path("LABELS")),
        "test_looked_at": looked,
        "seed": seed,
        "draws": metrics.DRAWS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **figures(rows["test"], logits["test"], weights),
        "validation": metrics.score(rows["val"], logits["val"][PERCEIVER], draws_of(rows["val"], seed)),
        "mirror": mirror_test(model, splits["test"], logits["test"][PERCEIVER], weights),
        "border": border_test(model, linear, splits, logits["test"], weights),
        "linear": {name: fit.describe() for name, fit in linear.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    # At once, so that the look is counted whatever becomes of the pictures.
    report["plots"] = {}
    write_text(out / REPORT, to_json(report))
    both = {name: np.concatenate([logits["val"][name], logits["test"][name]]) for name in MODELS}
    predictions.write_predictions(out / "predictions.csv", rows["val"] + rows["test"], both)
    report["plots"] = draw(out, model, splits["test"], logits["test"][PERCEIVER], report, epochs)
    write_text(out / REPORT, to_json(report))
    write_text(out / "report.md", markdown(report))
    return report


def check_splits(splits: Mapping[str, Split]) -> None:
    """Refuse an evaluation that would leak, or that has nothing to look at.

    Raises:
        ValueError: as `evaluate_run`.
    """
    missing = [part for part in SPLITS if part not in splits or not splits[part].rows]
    if missing or set(splits) - set(SPLITS):
        raise ValueError(f"splits: got {sorted(splits)}, need pictures in each of {list(SPLITS)}")
    for part, split in splits.items():
        if len(split.rows) != len(split.pictures):
            raise ValueError(f"splits: {part} has {len(split.rows)} rows for {len(split.pictures)} pictures")
    leaks, shown = patients_in_several((row.patient, part) for part, split in splits.items() for row in split.rows)
    if leaks:
        raise ValueError(
            f"splits: {leaks} patients stand in two splits ({shown}), so the test would not "
            "be of unseen patients; split by patient with examples.akoa.generate_labels"
        )


def looked_at(out: Path) -> int:
    """How often the test set of a run's folder was looked at so far.

    Raises:
        ValueError: report.json is there, but does not say.
    """
    path = out / REPORT
    if not path.exists():
        return 0
    try:
        looks = json.loads(path.read_text(encoding="utf-8"))["test_looked_at"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read, so looks cannot be counted; move it") from error
    if not isinstance(looks, int):
        raise ValueError(f"{path}: test_looked_at is {looks!r}, need a whole number")
    return looks


def fit_baselines(splits: Mapping[str, Split], *, progress: bool = False) -> dict[str, Linear]:
    """Linear models: on the pictures, on these and their mirror images, on nothing but borders."""
    train, val = splits["train"], splits["val"]
    border = [baselines.seen_as(split, border_only) for split in (train, val)]
    return {
        LINEAR: baselines.fit_linear(train, val, mirrored=False, progress=progress),
        LINEAR_MIRRORED: baselines.fit_linear(train, val, mirrored=True, progress=progress),
        "linear_on_border": baselines.fit_linear(*border, mirrored=False, progress=progress),
    }


def all_logits(
    model: nn.Module, linear: Mapping[str, Linear], train: Split, split: Split, *, progress: bool
) -> dict[str, np.ndarray]:
    """What each of `MODELS` says about a split."""
    return {
        PERCEIVER: predict(model, split.pictures, progress=progress),
        LINEAR: linear[LINEAR].logits(split.pictures),
        LINEAR_MIRRORED: linear[LINEAR_MIRRORED].logits(split.pictures),
        MAJORITY: baselines.majority(train, len(split.rows)),
    }


def draws_of(rows: Sequence[Row], seed: int) -> metrics.Weights:
    """The bootstrap's draws of the patients of some rows."""
    return metrics.resample(len({row.patient for row in rows}), seed)


def describe_data(splits: Mapping[str, Split]) -> dict[str, Any]:
    """What the data is, and how much of it stands where.

    Real patients' numbers begin with 9, and those of the phantom never do.
    """
    real = {row.patient.startswith("9") for split in splits.values() for row in split.rows}
    kind = "mixed" if len(real) > 1 else "AKOA" if real == {True} else "phantom"
    return {
        "kind": kind,
        "picture": list(splits["test"].pictures.shape[-2:]),
        "splits": {part: count(splits[part].rows) for part in SPLITS},
    }


def to_json(report: Mapping[str, Any]) -> str:
    """The text of report.json."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0: written, 2: wrong arguments or a broken run, 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.akoa.evaluate",
        description="Evaluate the weights of a run's folder on its test set; counts the looks.",
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of the run, with weights/ in it")
    add("--data", type=Path, required=True, help="folder with the PNG files")
    add("--labels", type=Path, required=True, help="labels.csv that the run was trained on")
    add("--fold", type=int, help="where the labels hold folds, and run.json does not say which")
    add("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    add("--again", action="store_true", help="look once more at a test set that was looked at")
    args = parser.parse_args(argv)
    try:
        report = _evaluate_folder(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    accuracy = report["models"][PERCEIVER]["slice"]["accuracy"]
    print(f"accuracy of test slices: {show(accuracy)}; all of it in {args.run / 'report.md'}")
    return 0


def _evaluate_folder(args: argparse.Namespace) -> dict[str, Any]:
    looks = looked_at(args.run)
    if looks and not args.again:
        raise ValueError(
            f"the test set of {args.run} was looked at before ({looks} so far); read {args.run / 'report.md'}, "
            "or look again with --again, which is counted"
        )
    model = load(args.run / WEIGHTS)
    size = trained_size(args.run / WEIGHTS, model)
    fold = read_record(args.run).get("fold") if args.fold is None else args.fold
    knees = Knees(data=args.data, labels=args.labels, size=size, fold=fold, augment=False)
    check_rows(args.run, knees.rows)
    splits = {part: knees.split(part) for part in SPLITS}
    history = args.run / "history.csv"
    return evaluate_run(
        model,
        splits,
        args.run,
        history=history if history.exists() else None,
        seed=args.seed,
        command=regenerate(args.run, args.data, args.labels, fold),
        progress=True,
    )


def regenerate(run: Path, data: Path, labels: Path, fold: int | None = None) -> str:
    """The command that evaluates a run again."""
    parts = ["--run", str(run), "--data", str(data), "--labels", str(labels)]
    parts += [] if fold is None else ["--fold", str(fold)]
    return f"python -m examples.akoa.evaluate {shlex.join(parts)} --again"


if __name__ == "__main__":
    sys.exit(main())
