"""Analyses of a test set: metrics, errors, mirror test, border test and suspected label errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import confusion_matrix
from torch import nn

from examples.akoa.dataset.datamodule import Split
from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation import metrics, predictions
from examples.akoa.evaluation.baselines import LinearModel, border_only, mirror, without_border
from examples.akoa.evaluation.inference import predict
from examples.akoa.evaluation.metrics import Report, Weights
from examples.akoa.evaluation.predictions import LINEAR, MODELS, PERCEIVER

Logits = Mapping[str, np.ndarray]
"""Logits of each model for the same images."""

_MAX_LISTED = 40


def score_test_set(rows: Sequence[Row], logits: Logits, weights: Weights) -> Report:
    """Metrics of the test set that follow from labels and logits alone, by their keys in the report."""
    ours = logits[PERCEIVER]
    samples = {
        "slice": predictions.by_slice(rows, ours),
        "volume": predictions.by_volume(rows, ours),
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


def mirror_test(model: nn.Module, test: Split, logits: np.ndarray, weights: Weights) -> Report:
    """Distance of p(right | x) + p(right | mirror image of x) from 1.

    Returns:
        `mean` (with its interval) and `max` of the distance, and `same_verdict`, the share of slices whose mirror image
        gets the same side.
    """
    mirrored = predict(model, mirror(test.images))
    distance = np.abs(predictions.probability(logits) + predictions.probability(mirrored) - 1)
    sample = predictions.by_slice(test.rows, logits)
    same = ((logits > 0) == (mirrored > 0)).astype(float)
    return {
        "mean": metrics.mean_with_interval(sample, distance, weights),
        "max": float(distance.max()),
        "same_verdict": metrics.mean_with_interval(sample, same, weights),
    }


def border_test(
    model: nn.Module,
    linear_models: Mapping[str, LinearModel],
    splits: Mapping[str, Split],
    logits: Logits,
    weights: Weights,
) -> Report:
    """Accuracy of slices with whole images, with a black border (`masked`), and with the border alone (`only`)."""
    test = splits["test"]
    masked, only = without_border(test.images), border_only(test.images)
    logits_by_input = {
        PERCEIVER: {
            "whole": logits[PERCEIVER],
            "masked": predict(model, masked),
            "only": predict(model, only),
        },
        LINEAR: {
            "whole": logits[LINEAR],
            "masked": linear_models[LINEAR].logits(masked),
            "only": linear_models[LINEAR].logits(only),
        },
        "linear_on_border": {"only": linear_models["linear_on_border"].logits(only)},
    }
    return {
        model_name: {
            name: metrics.estimate(*metrics.draw_accuracy(predictions.by_slice(test.rows, each), weights))
            for name, each in by_input.items()
        }
        for model_name, by_input in logits_by_input.items()
    }


def rank_errors(sample: predictions.Sample) -> list[int]:
    """Indices of wrong predictions, the most confident first."""
    is_wrong = np.flatnonzero(~sample.correct)
    order = np.argsort(-np.abs(sample.logits[is_wrong]), kind="stable")
    return [int(i) for i in is_wrong[order]]


def suspect_volumes(rows: Sequence[Row], logits: np.ndarray) -> list[Report]:
    """Volumes whose prediction contradicts the label, the most confident first."""
    sample, keys = predictions.by_volume(rows, logits), predictions.volume_keys(rows)
    is_wrong = (logits > 0) != np.array([row.side == "right" for row in rows])
    disagreeing = Counter(predictions.volume_of(row) for row, wrong in zip(rows, is_wrong, strict=True) if wrong)
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
        for i in rank_errors(sample)
    ]


def suspect_slices(rows: Sequence[Row], logits: np.ndarray) -> list[Report]:
    """Slices whose prediction contradicts the label although that of their volume does not.

    The most confident `_MAX_LISTED` are returned. Slices of other volumes are covered by `suspect_volumes`.
    """
    volumes = predictions.by_volume(rows, logits)
    volume_correct = dict(zip(predictions.volume_keys(rows), volumes.correct, strict=True))
    sample = predictions.by_slice(rows, logits)
    suspects = [i for i in rank_errors(sample) if volume_correct[predictions.volume_of(rows[i])]]
    return [
        {
            "image": rows[i].image,
            "patient": rows[i].patient,
            "visit": rows[i].visit,
            "side": rows[i].side,
            "slice": rows[i].slice,
            "probability_right": float(sample.probabilities[i]),
        }
        for i in suspects[:_MAX_LISTED]
    ]
