"""Pooled result of a cross-validation: every patient is tested once, by a model trained on other patients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation import metrics
from examples.akoa.evaluation.metrics import Report
from examples.akoa.evaluation.predictions import MODELS, PERCEIVER, read_predictions, volume_keys

LEVELS = ("slice", "volume", "patient")


def summarize_folds(reports: Sequence[Report], predictions: Sequence[Path], seed: int = 0) -> Report:
    """Pool the test predictions of the folds, and summarize the differences between folds.

    Args:
        reports: Report of `evaluate_run` for each fold.
        predictions: Paths of their predictions.csv, in the same order.
        seed: Seed of the bootstrap.

    Returns:
        `models` and `difference`, of the same form as in a report but over the patients of all folds; `each`, the
        accuracies of the Perceiver by fold; `spread`, their mean, standard deviation (over folds, n - 1), minimum and
        maximum; the numbers of folds, patients, volumes and slices.

    Raises:
        ValueError: There are no folds, the numbers of reports and predictions differ, the folds are of several kinds of
            data, or a patient is tested in two folds.
    """
    if not reports or len(reports) != len(predictions):
        raise ValueError(
            f"reports, predictions: got {len(reports)} and {len(predictions)}, need one each for every fold"
        )
    kinds = sorted({report["data"]["kind"] for report in reports})
    if len(kinds) > 1:
        raise ValueError(f"reports: folds are of several kinds of data, {' and '.join(kinds)}")
    rows, logits = _pool(predictions)
    weights = metrics.resample(len({row.patient for row in rows}), seed)
    each = [{level: report["models"][PERCEIVER][level]["accuracy"]["value"] for level in LEVELS} for report in reports]
    return {
        "data": {"kind": kinds[0], **count_data(rows)},
        "folds": len(reports),
        "seed": seed,
        "draws": metrics.DRAWS,
        "models": {name: metrics.score(rows, logits[name], weights) for name in MODELS},
        "difference": {
            name: metrics.difference(rows, logits[PERCEIVER], logits[name], weights)
            for name in MODELS
            if name != PERCEIVER
        },
        "each": each,
        "spread": {level: _spread([fold[level] for fold in each]) for level in LEVELS},
    }


def count_data(rows: Sequence[Row]) -> dict[str, int | float]:
    """Numbers of patients, knees, volumes and slices, and the share of right slices."""
    return {
        "patients": len({row.patient for row in rows}),
        "knees": len({(row.patient, row.side) for row in rows}),
        "volumes": len(volume_keys(rows)),
        "slices": len(rows),
        "right_share": sum(row.side == "right" for row in rows) / max(len(rows), 1),
    }


def _pool(predictions: Sequence[Path]) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the test slices of all folds, and the logits of each model for them."""
    rows: list[Row] = []
    logits_by_fold: dict[str, list[np.ndarray]] = {name: [] for name in MODELS}
    tested: Counter[str] = Counter()
    for path in predictions:
        fold_rows, logits = read_predictions(path)
        test = np.array([row.split == "test" for row in fold_rows], bool)
        if not test.any():
            raise ValueError(f"{path}: contains no predictions of test slices")
        rows += [row for row in fold_rows if row.split == "test"]
        tested.update({row.patient for row in fold_rows if row.split == "test"})
        for name in MODELS:
            logits_by_fold[name].append(logits[name][test])
    twice = sorted(patient for patient, folds in tested.items() if folds > 1)
    if twice:
        raise ValueError(
            f"{len(twice)} patients are tested in two folds, first {twice[0]}; pool the folds of one split"
        )
    return rows, {name: np.concatenate(parts) for name, parts in logits_by_fold.items()}


def _spread(shares: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation, minimum and maximum of the accuracies of the folds."""
    return {
        "mean": float(np.mean(shares)),
        "sd": float(np.std(shares, ddof=1)) if len(shares) > 1 else None,
        "low": min(shares),
        "high": max(shares),
    }
