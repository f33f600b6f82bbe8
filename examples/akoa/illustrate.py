"""The figures of a report: which pictures they show, and the files they become."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from examples.akoa import metrics, plots, predictions
from examples.akoa.data import Split
from examples.akoa.findings import wrong_first
from examples.akoa.inference import attention
from examples.akoa.labels import Row
from examples.akoa.predictions import PERCEIVER
from perceiver_core import Perceiver

_SHOWN = 3  # pictures in each row of the attention figure
_GALLERY = 12


def draw(
    out: Path,
    model: nn.Module,
    test: Split,
    logits: np.ndarray,
    report: Mapping[str, Any],
    epochs: Sequence[Mapping[str, float]] | None,
) -> dict[str, str]:
    """Write the figures; returns the file of each."""
    sample = predictions.slices(test.rows, logits)
    levels = {"slice": sample, "volume": predictions.volumes(test.rows, logits)}
    error = report["models"][PERCEIVER]["slice"]["ece"]
    made = {
        "confusion": plots.confusion({level: np.array(table) for level, table in report["confusion"].items()}),
        "calibration": plots.reliability(report["calibration"], error),
        "abstention": plots.abstention(
            {level: metrics.coverage_curve(s) for level, s in levels.items()},
            report["abstention"]["slice"],
        ),
        "slices": plots.errors_by_slice(report["slices"]),
        "errors": draw_gallery(test, sample),
    }
    # Another model, such as a convolutional one, can be evaluated too; it has no maps.
    if any(isinstance(part, Perceiver) for part in model.modules()):
        made["attention"] = draw_attention(model, test, sample)
    if epochs:
        made["curves"] = plots.curves(epochs)
    for name, figure in made.items():
        plots.save(figure, out / f"{name}.png")
    return {name: f"{name}.png" for name in made}


def draw_attention(model: nn.Module, test: Split, sample: predictions.Sample) -> Figure:
    """Maps over sure and right verdicts of each side, then over the most wrong ones.

    The examples are of different patients as far as these go round.
    """
    sure = np.argsort(-np.abs(sample.logits), kind="stable")
    chosen = {
        "right": _one_each(test.rows, [i for i in sure if sample.correct[i] and sample.right[i]]),
        "left": _one_each(test.rows, [i for i in sure if sample.correct[i] and not sample.right[i]]),
        "most wrong": _one_each(test.rows, wrong_first(sample)),
    }
    groups = {}
    for name, of in chosen.items():
        if not of:
            continue
        pictures = test.pictures[torch.tensor(of)]
        captions = [
            f"{test.rows[i].side}, slice {test.rows[i].slice}, p(right) {sample.probabilities[i]:.2f}" for i in of
        ]
        groups[name] = (pictures.numpy(), attention(model, pictures), captions)
    return plots.attention(groups)


def draw_gallery(test: Split, sample: predictions.Sample) -> Figure:
    """The most confident disagreement of each volume."""
    first: dict[predictions.Volume, int] = {}
    for i in wrong_first(sample):
        first.setdefault(predictions.volume_of(test.rows[i]), i)
    of = list(first.values())[:_GALLERY]
    pictures = test.pictures[torch.tensor(of, dtype=torch.long)].numpy()
    return plots.gallery(pictures, [test.rows[i] for i in of], sample.probabilities[of].tolist())


def read_history(path: Path) -> list[dict[str, float]]:
    """Lightning's metrics.csv, one mapping an epoch; its rows each fill some columns only.

    Raises:
        FileNotFoundError: there is no such file.
    """
    epochs: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line.get("epoch"):
                known = {name: float(value) for name, value in line.items() if value}
                epochs.setdefault(int(known["epoch"]), {}).update(known)
    return [epochs[epoch] for epoch in sorted(epochs)]


def _one_each(rows: Sequence[Row], order: Sequence[int]) -> list[int]:
    """The first few of an order, of different patients as far as possible."""
    seen: set[str] = set()
    first: list[int] = []
    rest: list[int] = []
    for i in order:
        (rest if rows[i].patient in seen else first).append(int(i))
        seen.add(rows[i].patient)
    return (first + rest)[:_SHOWN]
