"""Draws the speed chart of the README from recorded measurements: `python docs/figures/speed_chart.py`.

The measurements are in `docs/figures/benchmarks`. Each bar is the time of the peer in eager PyTorch divided by the time
of the candidate on the same processor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from perceiver_core.atomic_files import write_atomically

FOLDER = Path(__file__).parent
AVX512, AVX2, RIVAL = "#1f5fbf", "#7fb0ea", "#b9b9b9"
LEGEND = {
    AVX512: "this library, AVX-512 (Zen 5)",
    AVX2: "this library, AVX2",
    RIVAL: "alternatives to this library",
}


class Bar(NamedTuple):
    """One candidate: its smallest and largest speedup and, where they are recorded, the times behind them."""

    label: str
    low: float
    high: float
    times: str
    color: str


def rows(file: str) -> list[dict]:
    return json.loads((FOLDER / "benchmarks" / f"{file}.json").read_text())["rows"]


def bar(label: str, peer: float, medians: list[float], color: str) -> Bar:
    """The bar of a candidate with these medians, beside a peer with the median `peer`, all in milliseconds."""
    unit, scale, form = ("ms", 1, ",.0f") if peer < 10_000 else ("s", 1000, ".1f")
    times = " to ".join(format(ms / scale, form) for ms in medians)
    times = f"{format(peer / scale, form)} → {times} {unit}"
    return Bar(label, peer / max(medians), peer / min(medians), times, color)


def recorded(file: str, **wanted: object) -> dict[str, float]:
    """Medians by candidate, of the rows of a file that have the `wanted` entries."""
    return {row["candidate"]: row["median ms"] for row in rows(file) if wanted.items() <= row.items()}


def read(direction: str) -> list[Bar]:
    """One read of a 224 x 224 image by 512 latents with one head of width 261."""
    times = recorded("read", latents=512, head=261, batch=1, dtype="float32", direction=direction)
    ratio = next(row["ratio"] for row in rows("avx2") if row.get("direction") == direction)
    return [
        bar("AVX-512", times["einsum"], [times["library"]], AVX512),
        Bar("AVX2", ratio, ratio, "", AVX2),
        bar("AVX-512, fused attention", times["einsum"], [times["sdpa"]], RIVAL),
    ]


def model(peer: str, task: str, file: str, name: str) -> list[Bar]:
    """One task of a whole model beside the peer, on each processor where it was measured."""
    times = recorded(file, model=name, task=task)
    entries = [row for row in rows("avx2") if (row.get("model"), row.get("task")) == (name, task)]
    others = {row["candidate"]: row["ms"] for row in entries}
    candidates = [
        ("ours", "AVX2", AVX2),
        ("ours, torch.compile", "AVX2, torch.compile", AVX2),
        (f"{peer}, torch.compile", "AVX2, peer, torch.compile", RIVAL),
        (f"{peer}, ONNX Runtime", "AVX2, peer, ONNX Runtime", RIVAL),
    ]
    bars = [bar(label, others[peer][0], others[who], color) for who, label, color in candidates if who in others]
    return [bar("AVX-512", times[peer], [times["ours"]], AVX512), *bars]


def columns() -> tuple[list[tuple[str, list[Bar]]], list[tuple[str, list[Bar]]]]:
    theirs = ("models", "perceiver-pytorch README")
    fourier = ("published_fourier", "transformers Fourier classifier")
    masked = ("published_masked", "transformers masked LM")
    flow = ("published_flow", "transformers optical flow")
    left = [
        ("One read of a 224 x 224 image: forward", read("forward")),
        ("One read of a 224 x 224 image: forward, backward", read("with backward")),
        ("Model of its README: inference", model("perceiver-pytorch", "inference", *theirs)),
        ("Model of its README: training", model("perceiver-pytorch", "training", *theirs)),
    ]
    right = [
        ("Fourier image classifier: inference", model("transformers", "inference", *fourier)),
        ("Fourier image classifier: training", model("transformers", "training", *fourier)),
        ("Masked language model: inference", model("transformers", "inference", *masked)),
        ("Masked language model: training", model("transformers", "training", *masked)),
        ("Optical flow: inference", model("transformers", "inference", *flow)),
    ]
    return left, right


def factor(bar: Bar) -> str:
    low, high = (f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in (bar.low, bar.high))
    return f"{low}x" if low == high else f"{low} to {high}x"


def panel(axes: plt.Axes, groups: list[tuple[str, list[Bar]]], widest: int) -> float:
    """Draws groups of bars from the top down; returns where the last one ends."""
    y, places, labels = 0.0, [], []
    for title, bars in groups:
        axes.text(0, y, title, fontsize=10.5, fontweight="bold", va="center")
        axes.plot([1, 1], [y + 0.5, y + len(bars) + 0.5], color="#333333", linewidth=1, linestyle=":", zorder=3)
        for each in bars:
            y += 1
            axes.barh(y, each.high, height=0.8, color=each.color, alpha=0.5)
            axes.barh(y, each.low, height=0.8, color=each.color)
            text = axes.annotate(factor(each), (each.high, y), (4, 0), textcoords="offset points", va="center")
            text.set(fontsize=10, fontweight="bold")
            beside = {"xy": (1, 0.5), "xytext": (8, 0), "xycoords": text, "textcoords": "offset points"}
            axes.annotate(each.times, **beside, fontsize=9, color="#666666", va="center")
            places.append(y)
            labels.append(each.label)
        y += 1.6
    axes.set(xlim=(0, widest), xticks=range(0, widest, 5), yticks=places, yticklabels=labels)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return y - 1


def draw() -> plt.Figure:
    left, right = columns()
    widths = (30, 22)
    figure, (first, second) = plt.subplots(1, 2, figsize=(11.6, 6.2), layout="constrained", width_ratios=widths)
    lowest = max(panel(first, left, widths[0]), panel(second, right, widths[1]))
    titles = ("perceiver-pytorch", "transformers")
    for axes, title in zip((first, second), titles, strict=True):
        axes.set_ylim(lowest, -0.8)
        axes.set_title(title, loc="left", fontsize=12, color="#666666")
    handles = [Patch(color=color, label=label) for color, label in LEGEND.items()]
    second.legend(handles=handles, loc="lower left", frameon=False, fontsize=10)
    figure.suptitle("Speedup over the peer in eager PyTorch: float32, batch 1, two CPU cores", fontsize=13)
    return figure


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    chart = draw()
    write_atomically({FOLDER / "speed_chart.png": lambda path: chart.savefig(path, dpi=120, format="png")})
