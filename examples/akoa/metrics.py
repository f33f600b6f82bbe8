"""Numbers about verdicts, each with an interval that resamples patients.

Unusual here: the bootstrap does not loop. Each statistic is a function of sums over patients, so a
draw of patients is a row of multiplicities, and all draws are one matrix product. The AUC is one
too: the share of right/left pairs in order is a quadratic form in the multiplicities.
The values themselves come from scikit-learn, torch and torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from sklearn import metrics as sk
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_calibration_error

from examples.akoa import predictions
from examples.akoa.labels import Row
from examples.akoa.predictions import Sample

Draws = Float64[np.ndarray, " draws"]
Weights = Int64[np.ndarray, "draws patients"]
Estimate = dict[str, float | None]
"""`value`, and the ends `low` and `high` of its 95 % interval; None where it is not defined."""

DRAWS = 2_000
BINS = 15
THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def resample(patients: int, seed: int, draws: int = DRAWS) -> Weights:
    """How often each patient is drawn: as many patients as there are, with replacement.

    The same seed gives the same draws, so that two models are compared on the same ones (paired).
    """
    return np.random.default_rng(seed).multinomial(patients, np.full(patients, 1 / patients), size=draws)


def score(rows: Sequence[Row], logits: Float64[np.ndarray, " n"], weights: Weights) -> dict[str, dict[str, Estimate]]:
    """All figures of a model: by slice, by volume and by patient.

    Args:
        rows: n labels.
        logits: what the model says, positive = right.
        weights: from `resample`, for as many patients as the rows have.

    Returns:
        `slice` and `volume`: the figures of `values`. `patient`: `accuracy`, the share of patients
        all of whose volumes get the right verdict, with a bootstrap interval, and
        `accuracy_wilson`, the same share with Wilson's.
    """
    by_volume = predictions.volumes(rows, logits)
    samples = {"slice": predictions.slices(rows, logits), "volume": by_volume}
    figures = {level: _estimates(sample, weights) for level, sample in samples.items()}
    good = predictions.patients_correct(by_volume)
    share = weights @ good / weights.sum(1)
    figures["patient"] = {
        "accuracy": estimate(float(good.mean()), share),
        "accuracy_wilson": wilson(int(good.sum()), len(good)),
    }
    return figures


def difference(
    rows: Sequence[Row],
    ours: Float64[np.ndarray, " n"],
    theirs: Float64[np.ndarray, " n"],
    weights: Weights,
) -> dict[str, Estimate]:
    """Accuracy of one model less that of another, at each level; paired by patient."""
    at = {"slice": predictions.slices, "volume": predictions.volumes}
    gaps = {level: [draw_accuracy(make(rows, each), weights) for each in (ours, theirs)] for level, make in at.items()}
    good = [predictions.patients_correct(predictions.volumes(rows, x)) for x in (ours, theirs)]
    gaps["patient"] = [(float(each.mean()), np.asarray(weights @ each / weights.sum(1))) for each in good]
    return {level: estimate(a[0] - b[0], a[1] - b[1]) for level, (a, b) in gaps.items()}


def values(sample: Sample) -> dict[str, float | None]:
    """The figures of a sample; those that need both sides are None where there is one.

    `accuracy`, `balanced_accuracy`, `auc`, `log_loss` (nats), `brier`, `ece` (of p(right), `BINS`
    equal bins), and `sensitivity_left`, `sensitivity_right`: the share of true lefts and of true
    rights that are found.
    """
    right, verdict, p = sample.right, sample.logits > 0, sample.probabilities
    truth = torch.from_numpy(sample.right)
    both = 0 < right.sum() < len(right)
    # From logits, since log(1 - p) of a p that rounds to 1 is none.
    loss = binary_cross_entropy_with_logits(torch.from_numpy(sample.logits), truth.double())
    recall = {side: sk.recall_score(right, verdict, pos_label=side) for side in np.unique(right)}
    return {
        "accuracy": float(sk.accuracy_score(right, verdict)),
        "balanced_accuracy": float(np.mean([*recall.values()])) if both else None,
        "auc": float(sk.roc_auc_score(right, sample.logits)) if both else None,
        "log_loss": float(loss),
        "brier": float(sk.brier_score_loss(right, p, pos_label=True)),
        "ece": float(binary_calibration_error(torch.from_numpy(p), truth, n_bins=BINS)),
        "sensitivity_left": _known(recall.get(np.False_)),
        "sensitivity_right": _known(recall.get(np.True_)),
    }


def draw_values(sample: Sample, weights: Weights) -> dict[str, Draws]:
    """The figures of `values` for each draw of patients; NaN where a draw lacks a side."""
    right, p, correct = sample.right, sample.probabilities, sample.correct
    loss = np.logaddexp(0, np.where(right, -sample.logits, sample.logits))

    def drawn(*columns: np.ndarray) -> list[Draws]:
        return [weights @ by_patient(sample, column) for column in columns]

    n, n_right, n_left = drawn(np.ones(len(p)), right, ~right)
    good, good_right, good_left = drawn(correct, correct & right, correct & ~right)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"left": good_left / n_left, "right": good_right / n_right}
        auc = _draw_pairs(sample, weights) / (n_left * n_right)
    return {
        "accuracy": good / n,
        "balanced_accuracy": (found["left"] + found["right"]) / 2,
        "auc": auc,
        "log_loss": drawn(loss)[0] / n,
        "brier": drawn((p - right) ** 2)[0] / n,
        "ece": _draw_ece(sample, weights) / n,
        "sensitivity_left": found["left"],
        "sensitivity_right": found["right"],
    }


def draw_accuracy(sample: Sample, weights: Weights, among: Bool[np.ndarray, " n"] | None = None) -> tuple[float, Draws]:
    """Accuracy and its draws, of all verdicts or of those chosen by `among`."""
    kept = np.ones(len(sample.right), bool) if among is None else among
    return draw_share(sample, sample.correct, kept, weights)


def draw_share(
    sample: Sample,
    hits: Bool[np.ndarray, " n"],
    among: Bool[np.ndarray, " n"],
    weights: Weights,
) -> tuple[float, Draws]:
    """The share of hits among the chosen, and its draws; NaN where none is chosen."""
    hit, chosen = by_patient(sample, hits & among), by_patient(sample, among)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(hit.sum(), chosen.sum())), (weights @ hit) / (weights @ chosen)


def estimate(value: float | None, draws: Draws) -> Estimate:
    """A value with the 2.5 and 97.5 % points of its draws, those that are not defined left out."""
    known = draws[np.isfinite(draws)]
    if value is None or not np.isfinite(value) or not len(known):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def wilson(hits: int, count: int) -> Estimate:
    """A share with Wilson's interval, which has a width even where all or none are hits.

    Reference: E. B. Wilson, Journal of the American Statistical Association 22 (1927).

    Raises:
        ValueError: not 0 <= hits <= count, or count is 0.
    """
    if not 0 <= hits <= count or count == 0:
        raise ValueError(f"hits={hits}, count={count}: need 0 <= hits <= count and a count")
    share, width = hits / count, _Z**2 / count
    center = (share + width / 2) / (1 + width)
    half = _Z * np.sqrt(share * (1 - share) / count + width / (4 * count)) / (1 + width)
    low, high = max(0.0, center - half), min(1.0, center + half)
    return {"value": share, "low": float(low), "high": float(high)}


def abstention(sample: Sample, weights: Weights) -> list[dict[str, object]]:
    """For each threshold on the probability of the verdict: how many are judged, how well."""
    confidence = np.maximum(sample.probabilities, 1 - sample.probabilities)
    everything = np.ones(len(confidence), bool)
    lines: list[dict[str, object]] = []
    for threshold in THRESHOLDS:
        kept = confidence >= threshold
        lines.append(
            {
                "threshold": threshold,
                "coverage": estimate(*draw_share(sample, kept, everything, weights)),
                "accuracy": estimate(*draw_accuracy(sample, weights, kept)),
            }
        )
    return lines


def coverage_curve(
    sample: Sample,
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Coverage and accuracy where only the most confident verdicts count, down to each confidence.

    Equal confidences enter together: within a tie there is no order, and none may be made up.
    """
    order = np.argsort(-np.abs(sample.logits), kind="stable")
    size, good = np.abs(sample.logits)[order], np.cumsum(sample.correct[order])
    ends = np.flatnonzero(np.append(np.diff(size) != 0, True))
    return (ends + 1) / len(order), good[ends] / (ends + 1)


def calibration(sample: Sample, weights: Weights) -> list[dict[str, object]]:
    """For each bin of p(right): how many fell in, their mean p(right), the share that is right."""
    p, at = sample.probabilities, _bins(sample.probabilities)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "n": int((at == k).sum()),
            "mean_probability": float(p[at == k].mean()) if (at == k).any() else None,
            "share_right": estimate(*draw_share(sample, sample.right, at == k, weights)),
        }
        for k in range(BINS)
    ]


def error_by_slice(rows: Sequence[Row], logits: Float64[np.ndarray, " n"], weights: Weights) -> list[dict[str, object]]:
    """For each slice index: how many pictures, and the share that got the wrong side."""
    sample = predictions.slices(rows, logits)
    index = np.array([row.slice for row in rows])
    return [
        {
            "slice": int(k),
            "n": int((index == k).sum()),
            "error": estimate(*draw_share(sample, ~sample.correct, index == k, weights)),
        }
        for k in np.unique(index)
    ]


def by_patient(sample: Sample, column: np.ndarray) -> Float64[np.ndarray, " patients"]:
    """The sum of a column over each patient."""
    sums: Float64[np.ndarray, " patients"] = np.bincount(
        sample.patients, np.asarray(column, float), minlength=sample.count
    )
    return sums


def mean_with_interval(sample: Sample, column: Float64[np.ndarray, " n"], weights: Weights) -> Estimate:
    """The mean of a column over the sample."""
    n = weights @ by_patient(sample, np.ones(len(column)))
    return estimate(float(column.mean()), weights @ by_patient(sample, column) / n)


def _estimates(sample: Sample, weights: Weights) -> dict[str, Estimate]:
    draws = draw_values(sample, weights)
    return {name: estimate(value, draws[name]) for name, value in values(sample).items()}


def _draw_pairs(sample: Sample, weights: Weights) -> Draws:
    """The number of right/left pairs in order, ties half: multiplicities times a P x P matrix."""
    rights, whose = sample.logits[sample.right], sample.patients[sample.right]
    ahead = np.zeros((sample.count, sample.count))
    for patient in np.unique(sample.patients):
        lefts = np.sort(sample.logits[~sample.right & (sample.patients == patient)])
        below = np.searchsorted(lefts, rights, "left") + np.searchsorted(lefts, rights, "right")
        ahead[:, patient] = np.bincount(whose, below / 2, minlength=sample.count)
    pairs: Draws = np.einsum("dp,dp->d", weights @ ahead, weights.astype(float))
    return pairs


def _draw_ece(sample: Sample, weights: Weights) -> Draws:
    """The calibration error times the number of verdicts: sum over bins of |sum of p - rights|."""
    at = sample.patients * BINS + _bins(sample.probabilities)
    gaps = np.bincount(at, sample.probabilities - sample.right, minlength=sample.count * BINS)
    total: Draws = np.abs(weights @ gaps.reshape(sample.count, BINS)).sum(1)
    return total


def _bins(p: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    return np.minimum((p * BINS).astype(np.int64), BINS - 1)


def _known(value: float | None) -> float | None:
    return None if value is None else float(value)
