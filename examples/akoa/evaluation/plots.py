"""Plots of a report. Each function draws one figure and returns it, without changing global state.

Colors are those of Okabe and Ito, which are distinct for color-blind readers; curves that share a panel also differ in
their dashes or markers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation.metrics import Estimate, Report
from perceiver_core.atomic_files import write_atomically

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_DPI = 110
_COLOR_MAP = "magma"


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file atomically."""
    write_atomically({path: partial(write_png, figure)})


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure in PNG format, whatever the suffix of the path."""
    FigureCanvasAgg(figure)  # set explicitly, so that neither a display nor the global backend matters
    figure.savefig(path, dpi=_DPI, format="png")


def curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plot loss and accuracy over epochs.

    Args:
        history: One mapping per epoch with `epoch` and those of train_loss, val_loss, train_accuracy and val_accuracy
            that were logged.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, metric, label in zip(panels, ("loss", "accuracy"), ("loss (nats)", "accuracy of slices"), strict=True):
        for part, color, dashes in (("train", ORANGE, "--"), ("val", BLUE, "-")):
            name = f"{part}_{metric}"
            points = [(line["epoch"], line[name]) for line in history if name in line]
            if points:
                split = "training" if part == "train" else "validation"
                mark = "o" if len(points) == 1 else None
                panel.plot(*zip(*points, strict=True), dashes, color=color, label=split, marker=mark)
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(panel)
        if panel.lines:
            panel.legend(frameon=False)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def confusion(counts: Mapping[str, np.ndarray]) -> Figure:
    """Plot one 2 x 2 confusion matrix per level: true sides by row, predictions by column, shares of the true side."""
    figure = Figure(figsize=(4.4 * len(counts), 3.8), layout="constrained")
    for panel, (level, table) in zip(np.atleast_1d(figure.subplots(1, len(counts))), counts.items(), strict=True):
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(2, 2):
            color = "white" if shares[i, j] > 0.5 else "black"
            text = f"{table[i, j]:,}\n{shares[i, j]:.1%}"
            panel.text(j, i, text, ha="center", va="center", color=color, fontsize=13)
        panel.set(xticks=[0, 1], yticks=[0, 1], xlabel="verdict", ylabel="true side")
        panel.set_xticklabels(["left", "right"])
        panel.set_yticklabels(["left", "right"])
        panel.set_title(f"{level}s", fontsize=11)
        panel.spines[:].set_visible(False)
    return figure


def reliability(bins: Sequence[Report], error: Estimate) -> Figure:
    """Plot the share of right knees against the predicted probability, above the number of slices in each bin."""
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [line for line in bins if line["n"]]
    top.plot([0, 1], [0, 1], ":", color=GRAY, label="perfect")
    x = [line["mean_probability"] for line in filled]
    low, share, high = (np.array([line["share_right"][end] for line in filled]) for end in ("low", "value", "high"))
    # A percentile interval need not contain the value, and a bar cannot have a negative length.
    ends = np.maximum([share - low, high - share], 0)
    label = "Perceiver, 95 % interval"
    top.errorbar(x, share, ends, fmt="o", color=BLUE, ms=5, lw=1, capsize=2, label=label)
    top.set(ylabel="share that is right", ylim=(-0.03, 1.03))
    top.set_title(f"calibration error (ECE) {_percent(error)}", fontsize=10)
    top.legend(loc="upper left", edgecolor="none", framealpha=0.85)
    width = 1 / len(bins)
    bottom.bar([b["low"] + width / 2 for b in bins], [b["n"] for b in bins], 0.9 * width, color=BLUE)
    bottom.set(xlabel="p(right)", ylabel="slices", yscale="log", xlim=(-0.02, 1.02))
    # The axis starts below 1, since a bin of a single slice would have no height.
    bottom.set_ylim(0.5, 2 * max(line["n"] for line in bins))
    for panel in (top, bottom):
        _tidy(panel)
    return figure


def abstention(
    curves_by_level: Mapping[str, tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]],
    thresholds: Sequence[Report],
) -> Figure:
    """Plot accuracy against coverage at each level, with the thresholds marked on the curve of slices.

    Args:
        curves_by_level: Coverage and accuracy of the most confident predictions, by level.
        thresholds: Coverage and accuracy of slices at each threshold.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    panel = figure.subplots()
    styles = {"slice": (BLUE, "-"), "volume": (ORANGE, "--")}
    for level, (coverage, accuracy) in curves_by_level.items():
        color, dashes = styles[level]
        panel.step(coverage, accuracy, dashes, where="post", color=color, label=f"{level}s")
    marks = [line for line in thresholds if line["accuracy"]["value"] is not None]
    points = [(line["coverage"]["value"], line["accuracy"]["value"]) for line in marks]
    if points:
        panel.plot(*zip(*points, strict=True), "o", color=BLUE, label="slices, at a threshold")
    for line, point in _without_overlap(marks, points):
        panel.annotate(
            f"{line['threshold']:g}",
            point,
            (0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )
    panel.set(xlabel="coverage: share of predictions", ylabel="accuracy of these predictions")
    panel.set_xlim(0, 1.02)
    lowest = min(float(accuracy.min()) for _, accuracy in curves_by_level.values())
    panel.set_ylim(max(0, lowest - 0.1 * (1.02 - lowest) - 0.005), 1.005)
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.legend(frameon=False, loc="lower left")
    _tidy(panel)
    return figure


def errors_by_slice(lines: Sequence[Report]) -> Figure:
    """Plot the error rate at each slice index, with its interval as a band."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panel = figure.subplots()
    index = [line["slice"] for line in lines]
    low, value, high = ([line["error"][end] for line in lines] for end in ("low", "value", "high"))
    panel.fill_between(index, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    panel.plot(index, value, "o-", color=BLUE, ms=3, label="wrong verdicts")
    panel.set(xlabel="slice index in its volume", ylabel="share of slices", ylim=(0, None))
    if max(high) == 0:
        panel.set_ylim(0, 0.05)  # the range of a line of zeros is undefined otherwise
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.legend(frameon=False)
    _tidy(panel)
    return figure


def attention(
    groups: Mapping[str, tuple[UInt8[np.ndarray, "k h w"], np.ndarray, Sequence[str]]],
) -> Figure:
    """Plot each image beside its attention map, in multiples of uniform attention.

    Args:
        groups: Rows of the figure, keyed by name: the images of a row, their attention maps (each with sum 1), and
            captions.
    """
    columns = max(len(captions) for _, _, captions in groups.values())
    size = (4.1 * columns + 0.8, 2.2 * len(groups) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    # One scale for all maps, or a uniform map would look like a sharp one. The scale ends at a quantile, since the
    # single highest point would hide all others.
    maps = [maps * maps[0].size for _, maps, _ in groups.values()]
    top = max(2.0, float(np.quantile(np.concatenate([m.ravel() for m in maps]), 0.998)))
    panels = figure.subplots(len(groups), 2 * columns, squeeze=False)
    for row, (name, (images, _, captions)), shares in zip(panels, groups.items(), maps, strict=True):
        _blank(row)
        row[0].set_ylabel(name, fontsize=10)
        for k, caption in enumerate(captions):
            overlay(row[2 * k + 1], images[k], shares[k], top)
            row[2 * k].imshow(images[k], cmap="gray", vmin=0, vmax=255)
            row[2 * k].set_title(caption, fontsize=8)
    _scale(figure, panels, top)
    return figure


def single_map(image: UInt8[np.ndarray, "h w"], shares: np.ndarray, title: str) -> Figure:
    """Plot an image and its attention map (with sum 1) side by side."""
    figure = Figure(figsize=(6.6, 3.1), layout="constrained")
    panels = figure.subplots(1, 2)
    _blank(panels)
    panels[0].imshow(image, cmap="gray", vmin=0, vmax=255)
    relative = shares * shares.size
    top = max(2.0, float(np.quantile(relative, 0.998)))
    overlay(panels[1], image, relative, top)
    _scale(figure, panels, top)
    figure.suptitle(title, fontsize=10)
    return figure


def overlay(panel: Axes, image: UInt8[np.ndarray, "h w"], relative: np.ndarray, top: float) -> None:
    """Draw a map over an image, transparent where the attention is below uniform attention."""
    height, width = image.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    panel.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent)
    alpha = 0.8 * np.clip((relative - 1) / (top - 1), 0, 1) ** 0.5
    panel.imshow(relative, cmap=_COLOR_MAP, vmin=0, vmax=top, alpha=alpha, extent=extent)


def gallery(images: UInt8[np.ndarray, "k h w"], rows: Sequence[Row], p: Sequence[float]) -> Figure:
    """Plot images whose prediction contradicts the label, with their labels."""
    columns = min(6, max(len(rows), 1))
    lines = -(-len(rows) // columns) or 1
    figure = Figure(figsize=(max(2.1 * columns, 4.2), 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    _blank(panels)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    for panel, image, row, probability in zip(panels, images, rows, p, strict=False):
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        text = f"{row.patient}, visit {row.visit}\nslice {row.slice}, labeled {row.side}"
        panel.set_title(f"{text}\np(right) = {probability:.3f}", fontsize=8)
    if not rows:
        panels[0].text(0.5, 0.5, "no slice contradicts its label", ha="center", va="center")
    return figure


def _scale(figure: Figure, panels: np.ndarray, top: float) -> None:
    # Built explicitly, since the colors of the overlaid images are transparent.
    """Add a color bar."""
    colors = ScalarMappable(Normalize(0, top), _COLOR_MAP)
    bar = figure.colorbar(colors, ax=panels, shrink=0.8, pad=0.01, extend="max")
    bar.set_label("attention / uniform attention", fontsize=9)


def _percent(estimate: Estimate) -> str:
    if estimate["value"] is None:
        return "not defined"
    return f"{estimate['value']:.1%} (95 % interval {estimate['low']:.1%} to {estimate['high']:.1%})"


def _blank(panels: np.ndarray) -> None:
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)


def _tidy(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, lw=0.6)
    panel.set_axisbelow(True)


def _without_overlap(
    marks: Sequence[Report], points: Sequence[tuple[float, float]]
) -> list[tuple[Report, tuple[float, float]]]:
    """Select marks whose labels do not overlap."""
    selected: list[tuple[Report, tuple[float, float]]] = []
    for line, point in zip(marks, points, strict=True):
        if all(abs(point[0] - other[0]) > 0.04 for _, other in selected):
            selected.append((line, point))
    return selected
