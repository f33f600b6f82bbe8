"""Files of an evaluation, bound to each other by digests: report.json, predictions.csv, figures and report.md.

Each evaluation is a look at the test set. It is counted in report.json, which is written together with predictions.csv
and contains the digests of the predictions and the weights. All other files are made from these two, so that a command
that is interrupted afterwards is finished without another look.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from torch import nn

from examples.akoa.dataset.datamodule import Split
from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation import plots, predictions
from examples.akoa.evaluation.figures import draw_figures
from examples.akoa.evaluation.metrics import Report
from examples.akoa.evaluation.predictions import PERCEIVER
from examples.akoa.evaluation.report import markdown
from examples.akoa.training.run_record import weights_digest
from perceiver_core.atomic_files import write_atomically

REPORT, TEXT, PREDICTIONS = "report.json", "report.md", "predictions.csv"


def count_looks(out: Path) -> int:
    """Return the number of evaluations of the test set that report.json in the folder of a run records.

    Raises:
        ValueError: report.json exists, but does not contain the number.
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


def write_look(out: Path, report: Report, rows: Sequence[Row], logits: Mapping[str, np.ndarray]) -> None:
    """Add the digest of the predictions to the report, and write predictions.csv, then report.json."""
    text = predictions.to_csv(rows, logits)
    report["predictions_sha256"] = sha256(text.encode()).hexdigest()
    write_atomically({out / PREDICTIONS: text, out / REPORT: to_json(report)})


def check_look(out: Path, model: nn.Module | None = None) -> None:
    """Check predictions.csv, and the weights of a model, against the digests in report.json.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The files are from different evaluations, or report.json has no digests.
    """
    report = read_report(out)
    digests = {PREDICTIONS: sha256((out / PREDICTIONS).read_bytes()).hexdigest()}
    digests |= {} if model is None else {"weights": weights_digest(model)}
    for name, digest in digests.items():
        recorded = report.get(f"{Path(name).stem}_sha256")
        if recorded != digest:
            reason = "contains no digest of" if recorded is None else "is of other"
            raise ValueError(
                f"{out / REPORT} {reason} {Path(name).stem} than those in {out / name}; put back the files of one "
                "evaluation, or evaluate again (examples.akoa.evaluate --again), which is counted"
            )


def is_complete(out: Path) -> bool:
    """Return whether report.md, which is written last, matches report.json."""
    text = out / TEXT
    if not count_looks(out) or not text.exists():
        return False
    try:
        return text.read_text(encoding="utf-8") == markdown(read_report(out))
    except (KeyError, TypeError):  # entries that this version does not know
        return False


def has_unfinished_report(out: Path, model: nn.Module) -> bool:
    """Return whether the report of the last look is unfinished, and the files to finish it exist and match."""
    if not count_looks(out) or is_complete(out):
        return False
    try:
        check_look(out, model)
    except (FileNotFoundError, ValueError):
        return False
    return True


def write_presentation(
    out: Path, model: nn.Module, test: Split, epochs: Sequence[Mapping[str, float]] | None
) -> Report:
    """Write the figures and report.md from report.json and predictions.csv.

    Args:
        out: Folder of the run.
        model: Evaluated model.
        test: Test split.
        epochs: Metrics of each epoch for the training curves; None for no curves.

    Returns:
        Content of report.json.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The files, the model and the test split are not from the same evaluation.
    """
    check_look(out, model)
    report = read_report(out)
    rows, logits = predictions.read_predictions(out / PREDICTIONS)
    tested = np.array([row.split == "test" for row in rows], bool)
    if [row.image for row in test.rows] != [row.image for row in rows if row.split == "test"]:
        raise ValueError(f"labels: their test images are not those of {out / PREDICTIONS}; give the labels of the run")
    figures = draw_figures(model, test, logits[PERCEIVER][tested], report, epochs)
    files = {out / report["plots"][name]: partial(plots.write_png, figure) for name, figure in figures.items()}
    write_atomically({**files, out / TEXT: markdown(report)})
    return report


def read_report(out: Path) -> Report:
    """Read report.json.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    return json.loads((out / REPORT).read_text(encoding="utf-8"))


def to_json(report: Report) -> str:
    """Return the text of report.json."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"
