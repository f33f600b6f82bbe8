"""Pictures of results. matplotlib is imported only here, inside the functions that draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import failures, report
from benchmarks.contest import Row

BARS = {"median ms": "median time, ms", "peak MB": "peak memory of the call, MB"}
Fit = Callable[[Sequence[float], Sequence[float]], tuple[float, float]]


def bars(rows: Sequence[Row], path: Path, *, title: str, measures: Mapping[str, str] = BARS) -> None:
    """One group of bars a contest, one color a candidate, one panel a measure, on logarithmic axes."""
    rows = failures.measured(rows)
    if not rows:
        return
    groups = list(dict.fromkeys(_group(row) for row in rows))
    heights = _heights([groups.index(_group(row)) for row in rows])
    figure, axes = _figure(1, len(measures), height=1.4 + 0.27 * max(heights))
    for axis, (column, label) in zip(axes[0], measures.items(), strict=True):
        for index, name in enumerate(_names(rows)):
            own = [(height, row[column]) for height, row in zip(heights, rows, strict=True) if row["candidate"] == name]
            drawn = axis.barh(
                [height for height, _ in own], [value for _, value in own], 0.9, label=name, color=f"C{index}"
            )
            axis.bar_label(drawn, [report.text(float(value)) for _, value in own], padding=2, fontsize=7)
        _logarithmic(axis, "x", [row[column] for row in rows], room=2.0)
        axis.set(xlabel=label, ylim=(max(heights) + 1, -1))  # the first on top
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks([])
    middles = [[h for h, row in zip(heights, rows, strict=True) if _group(row) == group] for group in groups]
    axes[0][0].set_yticks([sum(own) / len(own) for own in middles], groups, fontsize=8)
    _finish(figure, axes, path, title)


def _heights(groups: Sequence[int]) -> list[float]:
    """Where the bars lie: next to each other, and one bar's room between groups."""
    return [place + group for place, group in enumerate(groups)]


def curves(rows: Sequence[Row], path: Path, *, measures: Mapping[str, str], fit: Fit, title: str) -> None:
    """One row of panels a sweep, one panel a measure: points, and the lines of their fitted powers."""
    rows = failures.measured(rows)
    if not rows:
        return
    sweeps = list(dict.fromkeys(row["along"] for row in rows))
    figure, axes = _figure(len(sweeps), len(measures), height=3.6 * len(sweeps))
    for line, along in zip(axes, sweeps, strict=True):
        for axis, (measure, column) in zip(line, measures.items(), strict=True):
            for index, name in enumerate(_names(rows)):
                own = [row for row in rows if row["candidate"] == name and row["along"] == along and row[column] > 0]
                sizes, values = [row["size"] for row in own], [row[column] for row in own]
                power, factor = fit(sizes, values)
                axis.plot(sizes, values, "o", color=f"C{index}", label=f"{name}: n^{power:.2f}")
                axis.plot(sizes, [factor * size**power for size in sizes], "-", color=f"C{index}", alpha=0.5)
            drawn = [row for row in rows if row["along"] == along]
            _logarithmic(axis, "x", [row["size"] for row in drawn], room=1.5)
            _logarithmic(axis, "y", [row[column] for row in drawn], room=1.5)
            axis.set(xlabel=f"n, number of {along}", ylabel=f"{measure}, {column}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    _finish(figure, axes[:0], path, title)


def _logarithmic(axis: Any, which: str, values: Sequence[float], *, room: float) -> None:
    """A logarithmic axis with plain numbers: 1, 10, 100, and 2 and 5 between them where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / room, max(positive) * room
    axis.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def _group(row: Row) -> str:
    """What tells one contest from another, all that stands before the candidate, in two lines."""
    sizes = list(row.items())[: list(row).index("candidate")]
    texts = [value if isinstance(value, str) else f"{name} {value:,}" for name, value in sizes]
    half = -(-len(texts) // 2)
    return ", ".join(texts[:half]) + "\n" + ", ".join(texts[half:])


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["candidate"] for row in rows))


def _figure(rows: int, columns: int, *, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Any, axes: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    if len(axes):
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
