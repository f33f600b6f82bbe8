"""The pictures of a report. Each function draws one and returns it; nothing global is touched.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; where two curves share
a panel, their dashes or markers differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from examples.akoa.labels import Row
from examples.akoa.metrics import Estimate

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_DPI = 110
_COLORS = "magma"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    FigureCanvasAgg(figure)  # chosen here, so that no display and no global backend matters
    figure.savefig(path, dpi=_DPI)


def curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and accuracy over epochs.

    Args:
        history: one mapping an epoch with `epoch`, and of train_loss, val_loss, train_accuracy,
            val_accuracy what is known.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, figure_of, label in zip(
        panels, ("loss", "accuracy"), ("loss (nats)", "accuracy of slices"), strict=True
    ):
        for part, color, dashes in (("train", ORANGE, "--"), ("val", BLUE, "-")):
            name = f"{part}_{figure_of}"
            points = [(line["epoch"], line[name]) for line in history if name in line]
            if points:
                known = "training" if part == "train" else "validation"
                mark = "o" if len(points) == 1 else None
                panel.plot(*zip(*points, strict=True), dashes, color=color, label=known, marker=mark)
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(panel)
        if panel.lines:
            panel.legend(frameon=False)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def confusion(counts: Mapping[str, np.ndarray]) -> Figure:
    """One 2 x 2 table a level: true sides down, verdicts across; shares are of the true side."""
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


def reliability(bins: Sequence[Mapping[str, Any]], error: Estimate) -> Figure:
    """Predicted probability against what came true, over how many pictures fell in each bin."""
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [line for line in bins if line["n"]]
    top.plot([0, 1], [0, 1], ":", color=GRAY, label="perfect")
    at = [line["mean_probability"] for line in filled]
    low, share, high = (np.array([line["share_right"][end] for line in filled]) for end in ("low", "value", "high"))
    # A percentile interval need not hold the value, and a bar cannot have a negative length.
    ends = np.maximum([share - low, high - share], 0)
    label = "Perceiver, 95 % interval"
    top.errorbar(at, share, ends, fmt="o", color=BLUE, ms=5, lw=1, capsize=2, label=label)
    top.set(ylabel="share that is right", ylim=(-0.03, 1.03))
    top.set_title(f"calibration error (ECE) {_percent(error)}", fontsize=10)
    top.legend(loc="upper left", edgecolor="none", framealpha=0.85)
    width = 1 / len(bins)
    below.bar([b["low"] + width / 2 for b in bins], [b["n"] for b in bins], 0.9 * width, color=BLUE)
    below.set(xlabel="p(right)", ylabel="slices", yscale="log", xlim=(-0.02, 1.02))
    # From below 1, or a bin of a single slice would have no height.
    below.set_ylim(0.5, 2 * max(line["n"] for line in bins))
    for panel in (top, below):
        _tidy(panel)
    return figure


def abstention(
    curves_of: Mapping[str, tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]],
    thresholds: Sequence[Mapping[str, Any]],
) -> Figure:
    """Accuracy against coverage at each level, with the thresholds marked on the slices' curve."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    panel = figure.subplots()
    styles = {"slice": (BLUE, "-"), "volume": (ORANGE, "--")}
    for level, (coverage, accuracy) in curves_of.items():
        color, dashes = styles[level]
        panel.step(coverage, accuracy, dashes, where="post", color=color, label=f"{level}s")
    marks = [line for line in thresholds if line["accuracy"]["value"] is not None]
    at = [(line["coverage"]["value"], line["accuracy"]["value"]) for line in marks]
    if at:
        panel.plot(*zip(*at, strict=True), "o", color=BLUE, label="slices, at a threshold")
    for line, place in _apart(marks, at):
        panel.annotate(
            f"{line['threshold']:g}",
            place,
            (0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
        )
    panel.set(xlabel="coverage: share that is judged", ylabel="accuracy of what is judged")
    panel.set_xlim(0, 1.02)
    lowest = min(float(accuracy.min()) for _, accuracy in curves_of.values())
    panel.set_ylim(max(0, lowest - 0.1 * (1.02 - lowest) - 0.005), 1.005)
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.legend(frameon=False, loc="lower left")
    _tidy(panel)
    return figure


def errors_by_slice(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """The share of wrong verdicts at each slice index, with its interval as a band."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panel = figure.subplots()
    index = [line["slice"] for line in lines]
    low, value, high = ([line["error"][end] for line in lines] for end in ("low", "value", "high"))
    panel.fill_between(index, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    panel.plot(index, value, "o-", color=BLUE, ms=3, label="wrong verdicts")
    panel.set(xlabel="slice index in its volume", ylabel="share of slices", ylim=(0, None))
    if max(high) == 0:
        panel.set_ylim(0, 0.05)  # else a line of zeros would stand in the middle of nothing
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.legend(frameon=False)
    _tidy(panel)
    return figure


def attention(
    groups: Mapping[str, tuple[UInt8[np.ndarray, "k h w"], np.ndarray, Sequence[str]]],
) -> Figure:
    """Pictures and, beside each, what the latents attend to, in multiples of an even spread.

    Args:
        groups: for each row of the figure its name, pictures, maps (adding to 1) and captions.
    """
    columns = max(len(captions) for _, _, captions in groups.values())
    size = (4.1 * columns + 0.8, 2.2 * len(groups) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    # One scale for all, or a flat map would look as busy as a sharp one. Not up to the single
    # highest point, beside which nothing else would show.
    maps = [maps * maps[0].size for _, maps, _ in groups.values()]
    top = max(2.0, float(np.quantile(np.concatenate([m.ravel() for m in maps]), 0.998)))
    panels = figure.subplots(len(groups), 2 * columns, squeeze=False)
    for row, (name, (pictures, _, captions)), shares in zip(panels, groups.items(), maps, strict=True):
        _blank(row)
        row[0].set_ylabel(name, fontsize=10)
        for k, caption in enumerate(captions):
            overlay(row[2 * k + 1], pictures[k], shares[k], top)
            row[2 * k].imshow(pictures[k], cmap="gray", vmin=0, vmax=255)
            row[2 * k].set_title(caption, fontsize=8)
    _scale(figure, panels, top)
    return figure


def single_map(picture: UInt8[np.ndarray, "h w"], shares: np.ndarray, title: str) -> Figure:
    """One picture and its attention map (adding to 1), side by side."""
    figure = Figure(figsize=(6.6, 3.1), layout="constrained")
    panels = figure.subplots(1, 2)
    _blank(panels)
    panels[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
    relative = shares * shares.size
    top = max(2.0, float(np.quantile(relative, 0.998)))
    overlay(panels[1], picture, relative, top)
    _scale(figure, panels, top)
    figure.suptitle(title, fontsize=10)
    return figure


def overlay(panel: Axes, picture: UInt8[np.ndarray, "h w"], relative: np.ndarray, top: float) -> Any:
    """Lay a map over a picture: see-through where the attention is below an even spread."""
    height, width = picture.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    panel.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
    alpha = 0.8 * np.clip((relative - 1) / (top - 1), 0, 1) ** 0.5
    panel.imshow(relative, cmap=_COLORS, vmin=0, vmax=top, alpha=alpha, extent=extent)


def gallery(pictures: UInt8[np.ndarray, "k h w"], rows: Sequence[Row], p: Sequence[float]) -> Figure:
    """Pictures whose verdict contradicts the label, with what the label says."""
    columns = min(6, max(len(rows), 1))
    lines = -(-len(rows) // columns) or 1
    figure = Figure(figsize=(max(2.1 * columns, 4.2), 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    _blank(panels)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    for panel, picture, row, each in zip(panels, pictures, rows, p, strict=False):
        panel.imshow(picture, cmap="gray", vmin=0, vmax=255)
        text = f"{row.patient}, visit {row.visit}\nslice {row.slice}, labeled {row.side}"
        panel.set_title(f"{text}\np(right) = {each:.3f}", fontsize=8)
    if not rows:
        panels[0].text(0.5, 0.5, "no slice contradicts its label", ha="center", va="center")
    return figure


def _scale(figure: Figure, panels: np.ndarray, top: float) -> None:
    # Not from an image: its colors are see-through.
    colors = ScalarMappable(Normalize(0, top), _COLORS)
    bar = figure.colorbar(colors, ax=panels, shrink=0.8, pad=0.01, extend="max")
    bar.set_label("attention / even spread", fontsize=9)


def _percent(given: Estimate) -> str:
    if given["value"] is None:
        return "not defined"
    return f"{given['value']:.1%} (95 % interval {given['low']:.1%} to {given['high']:.1%})"


def _blank(panels: np.ndarray) -> None:
    for panel in panels.ravel():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)


def _tidy(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, lw=0.6)
    panel.set_axisbelow(True)


def _apart(
    marks: Sequence[Mapping[str, Any]], at: Sequence[tuple[float, float]]
) -> list[tuple[Mapping[str, Any], tuple[float, float]]]:
    """Those marks that have room for a name: names of thresholds must not stand on each other."""
    chosen: list[tuple[Mapping[str, Any], tuple[float, float]]] = []
    for line, place in zip(marks, at, strict=True):
        if all(abs(place[0] - other[0]) > 0.04 for _, other in chosen):
            chosen.append((line, place))
    return chosen
