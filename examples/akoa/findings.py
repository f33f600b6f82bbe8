"""What there is to find in a test set: errors, their places, their mirror images, their borders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix
from torch import nn

from examples.akoa import metrics, predictions
from examples.akoa.baselines import Linear, border_only, mirror, without_border
from examples.akoa.data import Split
from examples.akoa.inference import predict
from examples.akoa.labels import Row
from examples.akoa.metrics import Weights
from examples.akoa.predictions import LINEAR, MODELS, PERCEIVER

Logits = Mapping[str, np.ndarray]
"""What each model says about the same pictures."""

_LISTED = 40


def figures(rows: Sequence[Row], logits: Logits, weights: Weights) -> dict[str, Any]:
    """What labels and logits alone say about the test set; see the keys."""
    ours = logits[PERCEIVER]
    samples = {
        "slice": predictions.slices(rows, ours),
        "volume": predictions.volumes(rows, ours),
    }
    return {
        "models": {name: metrics.score(rows, logits[name], weights) for name in MODELS},
        "difference": {
            name: metrics.difference(rows, ours, logits[name], weights) for name in MODELS if name != PERCEIVER
        },
        "confusion": {
            level: confusion_matrix(s.right, s.logits > 0, labels=[False, True]).tolist()
            for level, s in samples.items()
        },
        "calibration": metrics.calibration(samples["slice"], weights),
        "abstention": {level: metrics.abstention(s, weights) for level, s in samples.items()},
        "slices": metrics.error_by_slice(rows, ours, weights),
        "suspects": {
            "volumes": suspect_volumes(rows, ours),
            "slices": suspect_slices(rows, ours),
        },
    }


def validation(rows: Sequence[Row], logits: np.ndarray, seed: int) -> dict[str, Any]:
    """The Perceiver's figures on the validation patients."""
    return metrics.score(rows, logits, metrics.resample(len({row.patient for row in rows}), seed))


def mirror_test(model: nn.Module, test: Split, logits: np.ndarray, weights: Weights) -> dict[str, Any]:
    """How far p(right | x) + p(right | mirror of x) is from 1.

    Returns:
        `mean` (with its interval) and `max` of the distance, and `same_verdict`: the share of
        slices whose mirror image is given the same side.
    """
    other = predict(model, mirror(test.pictures))
    distance = np.abs(predictions.probability(logits) + predictions.probability(other) - 1)
    sample = predictions.slices(test.rows, logits)
    same = ((logits > 0) == (other > 0)).astype(float)
    return {
        "mean": metrics.mean_with_interval(sample, distance, weights),
        "max": float(distance.max()),
        "same_verdict": metrics.mean_with_interval(sample, same, weights),
    }


def border_test(
    model: nn.Module,
    linear: Mapping[str, Linear],
    splits: Mapping[str, Split],
    logits: Logits,
    weights: Weights,
) -> dict[str, Any]:
    """Accuracy of slices: whole, with a black border (`masked`), and nothing but it (`only`)."""
    test = splits["test"]
    masked, only = without_border(test.pictures), border_only(test.pictures)
    seen = {
        PERCEIVER: {
            "whole": logits[PERCEIVER],
            "masked": predict(model, masked),
            "only": predict(model, only),
        },
        LINEAR: {
            "whole": logits[LINEAR],
            "masked": linear[LINEAR].logits(masked),
            "only": linear[LINEAR].logits(only),
        },
        "linear_on_border": {"only": linear["linear_on_border"].logits(only)},
    }
    return {
        name: {
            see: metrics.estimate(*metrics.draw_accuracy(predictions.slices(test.rows, each), weights))
            for see, each in of.items()
        }
        for name, of in seen.items()
    }


def wrong_first(sample: predictions.Sample) -> list[int]:
    """The indices of wrong verdicts, the most confident first."""
    wrong = np.flatnonzero(~sample.correct)
    order = np.argsort(-np.abs(sample.logits[wrong]), kind="stable")
    return [int(i) for i in wrong[order]]


def suspect_volumes(rows: Sequence[Row], logits: np.ndarray) -> list[dict[str, Any]]:
    """Volumes whose verdict contradicts the label, the most confident first."""
    sample, keys = predictions.volumes(rows, logits), predictions.volume_keys(rows)
    wrong = (logits > 0) != np.array([row.side == "right" for row in rows])
    disagreeing = Counter(predictions.volume_of(row) for row, bad in zip(rows, wrong, strict=True) if bad)
    slices = Counter(predictions.volume_of(row) for row in rows)
    first: dict[predictions.Volume, str] = {}
    for row in sorted(rows, key=lambda row: row.slice):
        first.setdefault(predictions.volume_of(row), row.image)
    return [
        {
            "patient": keys[i][0],
            "visit": keys[i][1],
            "side": keys[i][2],
            "probability_right": float(sample.probabilities[i]),
            "disagreeing": disagreeing[keys[i]],
            "slices": slices[keys[i]],
            "image": first[keys[i]],
        }
        for i in wrong_first(sample)
    ]


def suspect_slices(rows: Sequence[Row], logits: np.ndarray) -> list[dict[str, Any]]:
    """Slices whose verdict contradicts the label though that on their volume does not.

    The most confident first, `_LISTED` at most. Those of other volumes are named by the volume.
    """
    by_volume = predictions.volumes(rows, logits)
    agreed = dict(zip(predictions.volume_keys(rows), by_volume.correct, strict=True))
    sample = predictions.slices(rows, logits)
    alone = [i for i in wrong_first(sample) if agreed[predictions.volume_of(rows[i])]]
    return [
        {
            "image": rows[i].image,
            "patient": rows[i].patient,
            "visit": rows[i].visit,
            "side": rows[i].side,
            "slice": rows[i].slice,
            "probability_right": float(sample.probabilities[i]),
        }
        for i in alone[:_LISTED]
    ]
