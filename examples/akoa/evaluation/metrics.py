"""Metrics of predictions, each with a bootstrap interval that resamples patients.

The bootstrap is one matrix product instead of a loop: each statistic is a function of sums over patients, so a draw of
patients is a row of multiplicities. The AUC is included: the share of right/left pairs in order is a quadratic form in
the multiplicities. The values themselves come from scikit-learn, torch and torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from sklearn import metrics as sk
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_calibration_error

from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation import predictions
from examples.akoa.evaluation.predictions import Sample

Draws = Float64[np.ndarray, " draws"]
Weights = Int64[np.ndarray, "draws patients"]
Estimate = dict[str, float | None]
"""`value`, and the ends `low` and `high` of its 95 % interval; None if undefined."""
Report = dict[str, Any]
"""Content of report.json, or a part of it: nested mappings and lists of JSON values."""

DRAWS = 2_000
BINS = 15
THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def resample(patients: int, seed: int, draws: int = DRAWS) -> Weights:
    """Draw the multiplicity of each patient in bootstrap samples of the same number of patients.

    The same seed gives the same draws, so that two models are compared on the same ones (paired).
    """
    return np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=draws)


def score(rows: Sequence[Row], logits: Float64[np.ndarray, " n"], weights: Weights) -> dict[str, dict[str, Estimate]]:
    """All metrics of a model, by slice, by volume and by patient.

    Args:
        rows: Labels of n images.
        logits: Logits of the model, positive for right.
        weights: Multiplicities from `resample`, for the number of patients in the rows.

    Returns:
        `slice` and `volume`: the metrics of `values`. `patient`: `accuracy`, the share of patients all of whose volumes
            are correct, with a bootstrap interval, and `accuracy_wilson`, the same share with Wilson's interval.
    """
    volumes = predictions.by_volume(rows, logits)
    samples = {"slice": predictions.by_slice(rows, logits), "volume": volumes}
    result = {level: _estimates(sample, weights) for level, sample in samples.items()}
    correct = predictions.patients_correct(volumes)
    share = weights @ correct / weights.sum(1)
    result["patient"] = {
        "accuracy": estimate(float(correct.mean()), share),
        "accuracy_wilson": wilson(int(correct.sum()), len(correct)),
    }
    return result


def difference(
    rows: Sequence[Row],
    ours: Float64[np.ndarray, " n"],
    theirs: Float64[np.ndarray, " n"],
    weights: Weights,
) -> dict[str, Estimate]:
    """Accuracy of one model less that of another at each level, paired by patient."""
    levels = {"slice": predictions.by_slice, "volume": predictions.by_volume}
    gaps = {
        level: [draw_accuracy(group(rows, each), weights) for each in (ours, theirs)] for level, group in levels.items()
    }
    correct = [predictions.patients_correct(predictions.by_volume(rows, x)) for x in (ours, theirs)]
    gaps["patient"] = [(float(each.mean()), np.asarray(weights @ each / weights.sum(1))) for each in correct]
    return {level: estimate(a[0] - b[0], a[1] - b[1]) for level, (a, b) in gaps.items()}


def values(sample: Sample) -> dict[str, float | None]:
    """Metrics of a sample; those that need both sides are None if there is only one.

    The metrics are `accuracy`, `balanced_accuracy`, `auc`, `log_loss` (nats), `brier`, `ece` (of p(right), in `BINS`
    equal bins), and `sensitivity_left` and `sensitivity_right`, the recall of each side.
    """
    right, predicted, p = sample.right, sample.logits > 0, sample.probabilities
    truth = torch.from_numpy(sample.right)
    both = 0 < right.sum() < len(right)
    # From logits, since log(1 - p) is infinite if p rounds to 1.
    loss = binary_cross_entropy_with_logits(torch.from_numpy(sample.logits), truth.double())
    recall = {side: sk.recall_score(right, predicted, pos_label=side) for side in np.unique(right)}
    return {
        "accuracy": float(sk.accuracy_score(right, predicted)),
        "balanced_accuracy": float(np.mean([*recall.values()])) if both else None,
        "auc": float(sk.roc_auc_score(right, sample.logits)) if both else None,
        "log_loss": float(loss),
        "brier": float(sk.brier_score_loss(right, p, pos_label=True)),
        "ece": float(binary_calibration_error(torch.from_numpy(p), truth, n_bins=BINS)),
        "sensitivity_left": _float_or_none(recall.get(np.False_)),
        "sensitivity_right": _float_or_none(recall.get(np.True_)),
    }


def draw_values(sample: Sample, weights: Weights) -> dict[str, Draws]:
    """Metrics of `values` for each draw of patients; NaN if a draw lacks a side."""
    right, p, correct = sample.right, sample.probabilities, sample.correct
    loss = np.logaddexp(0, np.where(right, -sample.logits, sample.logits))

    def draw_sums(*columns: np.ndarray) -> list[Draws]:
        return [weights @ sum_by_patient(sample, column) for column in columns]

    num, num_right, num_left = draw_sums(np.ones(len(p)), right, ~right)
    num_correct, num_correct_right, num_correct_left = draw_sums(correct, correct & right, correct & ~right)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = {"left": num_correct_left / num_left, "right": num_correct_right / num_right}
        auc = _draw_pairs(sample, weights) / (num_left * num_right)
    return {
        "accuracy": num_correct / num,
        "balanced_accuracy": (recall["left"] + recall["right"]) / 2,
        "auc": auc,
        "log_loss": draw_sums(loss)[0] / num,
        "brier": draw_sums((p - right) ** 2)[0] / num,
        "ece": _draw_ece(sample, weights) / num,
        "sensitivity_left": recall["left"],
        "sensitivity_right": recall["right"],
    }


def draw_accuracy(sample: Sample, weights: Weights, among: Bool[np.ndarray, " n"] | None = None) -> tuple[float, Draws]:
    """Accuracy and its bootstrap draws, of all predictions or of those selected by `among`."""
    selected = np.ones(len(sample.right), bool) if among is None else among
    return draw_share(sample, sample.correct, selected, weights)


def draw_share(
    sample: Sample,
    hits: Bool[np.ndarray, " n"],
    among: Bool[np.ndarray, " n"],
    weights: Weights,
) -> tuple[float, Draws]:
    """Share of hits among the selected predictions, and its draws; NaN if none is selected."""
    hit, chosen = sum_by_patient(sample, hits & among), sum_by_patient(sample, among)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(hit.sum(), chosen.sum())), (weights @ hit) / (weights @ chosen)


def estimate(value: float | None, draws: Draws) -> Estimate:
    """Combine a value with the 2.5 and 97.5 % quantiles of its draws, without undefined draws."""
    finite = draws[np.isfinite(draws)]
    if value is None or not np.isfinite(value) or not len(finite):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(finite, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def wilson(hits: int, count: int) -> Estimate:
    """Share with Wilson's interval, which has a positive width even if all or none are hits.

    Reference: E. B. Wilson, Journal of the American Statistical Association 22 (1927).

    Raises:
        ValueError: Not 0 <= hits <= count, or count is 0.
    """
    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"hits={hits}, count={count}: need 0 <= hits <= count and a count")
    share, width = hits / count, _Z**2 / count
    center = (share + width / 2) / (1 + width)
    half = _Z * np.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    low, high = max(0.0, center - half), min(1.0, center + half)
    return {"value": share, "low": float(low), "high": float(high)}


def abstention(sample: Sample, weights: Weights) -> list[Report]:
    """Coverage and accuracy at each threshold on the probability of the predicted side."""
    confidence = np.maximum(sample.probabilities, 1 - sample.probabilities)
    everything = np.ones(len(confidence), bool)
    lines: list[Report] = []
    for threshold in THRESHOLDS:
        selected = confidence >= threshold
        lines.append(
            {
                "threshold": threshold,
                "coverage": estimate(*draw_share(sample, selected, everything, weights)),
                "accuracy": estimate(*draw_accuracy(sample, weights, selected)),
            }
        )
    return lines


def coverage_curve(
    sample: Sample,
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Coverage and accuracy of the predictions above each confidence.

    Predictions with equal confidence are added together, since their order is arbitrary.
    """
    order = np.argsort(-np.abs(sample.logits), kind="stable")
    confidence, correct = np.abs(sample.logits)[order], np.cumsum(sample.correct[order])
    ends = np.flatnonzero(np.append(np.diff(confidence) != 0, True))
    return (ends + 1) / len(order), correct[ends] / (ends + 1)


def calibration(sample: Sample, weights: Weights) -> list[Report]:
    """Number of predictions in each bin of p(right), their mean p(right), and the share of right knees."""
    p, bins = sample.probabilities, _bins(sample.probabilities)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "n": int((bins == k).sum()),
            "mean_probability": float(p[bins == k].mean()) if (bins == k).any() else None,
            "share_right": estimate(*draw_share(sample, sample.right, bins == k, weights)),
        }
        for k in range(BINS)
    ]


def error_by_slice(rows: Sequence[Row], logits: Float64[np.ndarray, " n"], weights: Weights) -> list[Report]:
    """Number of images and error rate at each slice index."""
    sample = predictions.by_slice(rows, logits)
    index = np.array([row.slice for row in rows])
    return [
        {
            "slice": int(k),
            "n": int((index == k).sum()),
            "error": estimate(*draw_share(sample, ~sample.correct, index == k, weights)),
        }
        for k in np.unique(index)
    ]


def sum_by_patient(sample: Sample, column: np.ndarray) -> Float64[np.ndarray, " patients"]:
    """Sum of a column over each patient."""
    return np.bincount(sample.patients, np.asarray(column, float), minlength=sample.num_patients)


def mean_with_interval(sample: Sample, column: Float64[np.ndarray, " n"], weights: Weights) -> Estimate:
    """Mean of a column over the sample, with its interval."""
    n = weights @ sum_by_patient(sample, np.ones(len(column)))
    return estimate(float(column.mean()), weights @ sum_by_patient(sample, column) / n)


def _estimates(sample: Sample, weights: Weights) -> dict[str, Estimate]:
    draws = draw_values(sample, weights)
    return {name: estimate(value, draws[name]) for name, value in values(sample).items()}


def _draw_pairs(sample: Sample, weights: Weights) -> Draws:
    """Number of right/left pairs in order for each draw, with ties counted half: a quadratic form of a P x P matrix."""
    right_logits, right_patients = sample.logits[sample.right], sample.patients[sample.right]
    ordered = np.zeros((sample.num_patients, sample.num_patients))
    for patient in np.unique(sample.patients):
        left_logits = np.sort(sample.logits[~sample.right & (sample.patients == patient)])
        below = np.searchsorted(left_logits, right_logits, "left") + np.searchsorted(left_logits, right_logits, "right")
        ordered[:, patient] = np.bincount(right_patients, below / 2, minlength=sample.num_patients)
    return np.einsum("dp,dp->d", weights @ ordered, weights.astype(float))


def _draw_ece(sample: Sample, weights: Weights) -> Draws:
    """Calibration error times the number of predictions: sum over bins of |sum of p - number of rights|."""
    cells = sample.patients * BINS + _bins(sample.probabilities)
    gaps = np.bincount(cells, sample.probabilities - sample.right, minlength=sample.num_patients * BINS)
    return np.abs(weights @ gaps.reshape(sample.num_patients, BINS)).sum(1)


def _bins(p: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    return np.minimum((p * BINS).astype(np.int64), BINS - 1)


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)
