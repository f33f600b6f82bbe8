"""Figures of a report: selection of the images they show, and their files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
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


def draw_figures(
    out: Path,
    model: nn.Module,
    test: Split,
    logits: np.ndarray,
    report: Report,
    epochs: Sequence[Mapping[str, float]] | None,
) -> dict[str, str]:
    """Write the figures and return the file name of each.

    Args:
        out: Folder of the files.
        model: Evaluated model.
        test: Test split.
        logits: Logits of the model for the test split.
        report: Content of report.json.
        epochs: Metrics of each epoch for the training curves; None for no curves.
    """
    sample = predictions.by_slice(test.rows, logits)
    levels = {"slice": sample, "volume": predictions.by_volume(test.rows, logits)}
    error = report["models"][PERCEIVER]["slice"]["ece"]
    figures = {
        "confusion": plots.confusion({level: np.array(table) for level, table in report["confusion"].items()}),
        "calibration": plots.reliability(report["calibration"], error),
        "abstention": plots.abstention(
            {level: metrics.coverage_curve(s) for level, s in levels.items()},
            report["abstention"]["slice"],
        ),
        "slices": plots.errors_by_slice(report["slices"]),
        "errors": draw_gallery(test, sample),
    }
    # Models without a Perceiver, such as convolutional ones, can be evaluated too; they have no maps.
    if any(isinstance(module, Perceiver) for module in model.modules()):
        figures["attention"] = draw_attention(model, test, sample)
    if epochs:
        figures["curves"] = plots.curves(epochs)
    for name, figure in figures.items():
        plots.save(figure, out / f"{name}.png")
    return {name: f"{name}.png" for name in figures}


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
    """Read Lightning's metrics.csv as one mapping per epoch; each of its rows fills some columns only.

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
