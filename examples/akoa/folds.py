"""Several folds as one result: every patient is tested once, by a model that has not seen them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.akoa import metrics
from examples.akoa.labels import Row
from examples.akoa.predictions import (
    MODELS,
    PERCEIVER,
    read_predictions,
    volume_keys,
)

LEVELS = ("slice", "volume", "patient")


def summarize_folds(reports: Sequence[Mapping[str, Any]], predictions: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """Pool the test predictions of the folds, and say how much the folds differ.

    Args:
        reports: what `evaluate_run` returned for each fold.
        predictions: the predictions.csv that each of them wrote, in the same order.
        seed: of the bootstrap.

    Returns:
        `models` and `difference`, of the same form as in a report but over the patients of all
        folds; `each`: the Perceiver's accuracies fold by fold; `spread`: their mean, standard
        deviation (of folds, n - 1), least and greatest; how many folds, patients, volumes, slices.

    Raises:
        ValueError: there are no folds, not as many reports as predictions, folds of several kinds
            of data, or a patient is tested in two folds.
    """
    if not reports or len(reports) != len(predictions):
        raise ValueError(f"reports, predictions: got {len(reports)} and {len(predictions)}, need one each a fold")
    kinds = sorted({report["data"]["kind"] for report in reports})
    if len(kinds) > 1:
        raise ValueError(f"reports: folds are of several kinds of data, {' and '.join(kinds)}")
    rows, logits = _pool(predictions)
    weights = metrics.resample(len({row.patient for row in rows}), seed)
    each = [{level: report["models"][PERCEIVER][level]["accuracy"]["value"] for level in LEVELS} for report in reports]
    return {
        "data": {"kind": kinds[0], **count(rows)},
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


def count(rows: Sequence[Row]) -> dict[str, int | float]:
    """How many patients, knees, volumes and slices, and the share of right slices."""
    return {
        "patients": len({row.patient for row in rows}),
        "knees": len({(row.patient, row.side) for row in rows}),
        "volumes": len(volume_keys(rows)),
        "slices": len(rows),
        "right_share": sum(row.side == "right" for row in rows) / max(len(rows), 1),
    }


def _pool(predictions: Sequence[Path]) -> tuple[list[Row], dict[str, np.ndarray]]:
    rows: list[Row] = []
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in MODELS}
    tested: Counter[str] = Counter()
    for path in predictions:
        found, logits = read_predictions(path)
        test = np.array([row.split == "test" for row in found], bool)
        if not test.any():
            raise ValueError(f"{path}: holds no predictions of test slices")
        rows += [row for row in found if row.split == "test"]
        tested.update({row.patient for row in found if row.split == "test"})
        for name in MODELS:
            pieces[name].append(logits[name][test])
    twice = sorted(patient for patient, folds in tested.items() if folds > 1)
    if twice:
        raise ValueError(
            f"{len(twice)} patients are tested in two folds, first {twice[0]}; pool the folds of one split"
        )
    return rows, {name: np.concatenate(piece) for name, piece in pieces.items()}


def _spread(shares: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": float(np.mean(shares)),
        "sd": float(np.std(shares, ddof=1)) if len(shares) > 1 else None,
        "low": min(shares),
        "high": max(shares),
    }
