"""Figures of a report, and selection of the images that they show."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from examples.akoa.dataset.datamodule import Split
from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation import metrics, plots, predictions
from examples.akoa.evaluation.analysis import rank_errors
from examples.akoa.evaluation.inference import attention_maps
from examples.akoa.evaluation.metrics import Report
from examples.akoa.evaluation.predictions import PERCEIVER
from perceiver_core import Perceiver

_NUM_COLUMNS = 3  # images in each row of the attention figure
_GALLERY_SIZE = 12


def figure_names(model: nn.Module, epochs: Sequence[Mapping[str, float]] | None) -> list[str]:
    """Names of the figures of a report.

    Models without a Perceiver, such as convolutional ones, have no attention maps.

    Args:
        model: Evaluated model.
        epochs: Metrics of each epoch; None or empty for no training curves.
    """
    has_maps = any(isinstance(module, Perceiver) for module in model.modules())
    names = ["confusion", "calibration", "abstention", "slices", "errors"]
    return [*names, *(["attention"] if has_maps else []), *(["curves"] if epochs else [])]


def draw_figures(
    model: nn.Module,
    test: Split,
    logits: np.ndarray,
    report: Report,
    epochs: Sequence[Mapping[str, float]] | None,
) -> dict[str, Figure]:
    """Draw the figures that a report lists as its plots.

    Args:
        model: Evaluated model.
        test: Test split.
        logits: Logits of the model for the test split.
        report: Content of report.json.
        epochs: Metrics of each epoch for the training curves.
    """
    sample = predictions.by_slice(test.rows, logits)
    levels = {"slice": sample, "volume": predictions.by_volume(test.rows, logits)}
    drawers: dict[str, Callable[[], Figure]] = {
        "confusion": lambda: plots.confusion({level: np.array(table) for level, table in report["confusion"].items()}),
        "calibration": lambda: plots.reliability(report["calibration"], report["models"][PERCEIVER]["slice"]["ece"]),
        "abstention": lambda: plots.abstention(
            {level: metrics.coverage_curve(s) for level, s in levels.items()}, report["abstention"]["slice"]
        ),
        "slices": lambda: plots.errors_by_slice(report["slices"]),
        "errors": lambda: draw_gallery(test, sample),
        "attention": lambda: draw_attention(model, test, sample),
        "curves": lambda: plots.curves(epochs or ()),
    }
    return {name: drawers[name]() for name in report["plots"]}


def draw_attention(model: nn.Module, test: Split, sample: predictions.Sample) -> Figure:
    """Attention maps of confident correct predictions of each side, then of the most confident errors.

    The examples are of different patients as far as possible.
    """
    confident = np.argsort(-np.abs(sample.logits), kind="stable")
    examples = {
        "right": _distinct_patients(test.rows, [i for i in confident if sample.correct[i] and sample.right[i]]),
        "left": _distinct_patients(test.rows, [i for i in confident if sample.correct[i] and not sample.right[i]]),
        "most wrong": _distinct_patients(test.rows, rank_errors(sample)),
    }
    groups = {}
    for name, indices in examples.items():
        if not indices:
            continue
        images = test.images[torch.tensor(indices)]
        captions = [
            f"{test.rows[i].side}, slice {test.rows[i].slice}, p(right) {sample.probabilities[i]:.2f}" for i in indices
        ]
        groups[name] = (images.numpy(), attention_maps(model, images), captions)
    return plots.attention(groups)


def draw_gallery(test: Split, sample: predictions.Sample) -> Figure:
    """Gallery of the most confident error of each volume."""
    first: dict[predictions.Volume, int] = {}
    for i in rank_errors(sample):
        first.setdefault(predictions.volume_of(test.rows[i]), i)
    indices = list(first.values())[:_GALLERY_SIZE]
    images = test.images[torch.tensor(indices, dtype=torch.long)].numpy()
    return plots.gallery(images, [test.rows[i] for i in indices], sample.probabilities[indices].tolist())


def read_history(path: Path) -> list[dict[str, float]]:
    """Read history.csv as one mapping per epoch. Rows may have empty columns.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    epochs: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line.get("epoch"):
                values = {name: float(value) for name, value in line.items() if value}
                epochs.setdefault(int(values["epoch"]), {}).update(values)
    return [epochs[epoch] for epoch in sorted(epochs)]


def _distinct_patients(rows: Sequence[Row], order: Sequence[int]) -> list[int]:
    """First indices of an order, of different patients as far as possible."""
    seen: set[str] = set()
    first: list[int] = []
    rest: list[int] = []
    for i in order:
        (rest if rows[i].patient in seen else first).append(int(i))
        seen.add(rows[i].patient)
    return (first + rest)[:_NUM_COLUMNS]
