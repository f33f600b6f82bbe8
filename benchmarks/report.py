"""Results as a Markdown table, as JSON and as figures, and notes about what could not be measured.

matplotlib is imported only inside the functions that draw.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from perceiver_core.atomic_files import write_atomically

Row: TypeAlias = dict[str, Any]

FAILED, REFUSED, LEFT_OUT = "failed: ", "refused: ", "left out: "  # how notes begin
LONGEST = 100  # characters of an error
BARS = {"median ms": "median time, ms", "peak MB": "peak memory of the call, MB"}


def describe_error(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:LONGEST]


def failures(rows: Sequence[Row]) -> list[str]:
    """Return the notes of rows that should have been measured, without those that were refused or left out."""
    return [f"{row['candidate']}: {row['note']}" for row in rows if row.get("note", "").startswith(FAILED)]


def measured(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have figures."""
    return [row for row in rows if "note" not in row]


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table; a cell without a value stays empty."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    cells = [list(columns), *([text(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    padded = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def line(row: Row) -> str:
    """Return a row in one line: sizes, candidate, and its time or the note."""
    result = row.get("note") or f"{text(row['median ms'])} ms"
    return f"{_sizes(row)}: {row['candidate']}: {result}"


def text(value: object) -> str:
    """Return a float with three digits, more before the point; anything else unchanged."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write results as JSON; the folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: json.dumps(content, indent=1) + "\n"})


def bars(rows: Sequence[Row], path: Path, *, title: str, measures: Mapping[str, str] = BARS) -> None:
    """Draw a group of bars per comparison, a color per candidate and a panel per measure, on logarithmic axes."""
    rows = measured(rows)
    if not rows:
        return
    labels = [_sizes(row, "\n") for row in rows]
    groups, names = (list(dict.fromkeys(these)) for these in (labels, [row["candidate"] for row in rows]))
    heights = [index + groups.index(label) for index, label in enumerate(labels)]  # a gap of one bar between groups
    figure, axes = _figure(1, len(measures), height=1.4 + 0.27 * max(heights), title=title)
    for axis, (column, label) in zip(axes[0], measures.items(), strict=True):
        for index, name in enumerate(names):
            own = [(height, row[column]) for height, row in zip(heights, rows, strict=True) if row["candidate"] == name]
            places, values = zip(*own, strict=True)
            drawn = axis.barh(places, values, 0.9, label=name, color=f"C{index}")
            axis.bar_label(drawn, [text(float(value)) for value in values], padding=2, fontsize=7)
        _logarithmic(axis, "x", [row[column] for row in rows], room=2.0)
        axis.set(xlabel=label, ylim=(max(heights) + 1, -1))  # the first on top
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks([])
    middles = [statistics.mean(h for h, label in zip(heights, labels, strict=True) if label == each) for each in groups]
    axes[0][0].set_yticks(middles, groups, fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    write_atomically({path: lambda temporary: figure.savefig(temporary, dpi=150, format="png")})


def curves(
    rows: Sequence[Row], path: Path, *, measures: Mapping[str, str], fit: Callable[..., Any], title: str
) -> None:
    """Draw a row of panels per sweep and a panel per measure: points, and the lines of their fitted powers."""
    rows = measured(rows)
    if not rows:
        return
    sweeps = list(dict.fromkeys(row["along"] for row in rows))
    figure, axes = _figure(len(sweeps), len(measures), height=3.6 * len(sweeps), title=title)
    for panels, along in zip(axes, sweeps, strict=True):
        for axis, (measure, column) in zip(panels, measures.items(), strict=True):
            drawn = [row for row in rows if row["along"] == along and row[column] > 0]
            for index, name in enumerate(dict.fromkeys(row["candidate"] for row in rows)):
                own = [row for row in drawn if row["candidate"] == name]
                sizes, values = [row["size"] for row in own], [row[column] for row in own]
                power, factor = fit(sizes, values)
                axis.plot(sizes, values, "o", color=f"C{index}", label=f"{name}: n^{power:.2f}")
                axis.plot(sizes, [factor * size**power for size in sizes], "-", color=f"C{index}", alpha=0.5)
            _logarithmic(axis, "x", [row["size"] for row in drawn], room=1.5)
            _logarithmic(axis, "y", [row[column] for row in drawn], room=1.5)
            axis.set(xlabel=f"n, number of {along}", ylabel=f"{measure}, {column}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    write_atomically({path: lambda temporary: figure.savefig(temporary, dpi=150, format="png")})


def _logarithmic(axis: Any, which: str, values: Sequence[float], *, room: float) -> None:
    """Make an axis logarithmic with plain numbers: 1, 10, 100; also 2 and 5 if the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / room, max(positive) * room
    axis.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def _sizes(row: Row, separator: str = ", ") -> str:
    """Return what distinguishes one comparison from another: the columns before the candidate, in two halves."""
    sizes = list(row.items())[: list(row).index("candidate")]
    texts = [value if isinstance(value, str) else f"{name} {value:,}" for name, value in sizes]
    half = -(-len(texts) // 2)
    return separator.join(filter(None, (", ".join(texts[:half]), ", ".join(texts[half:]))))


def _figure(rows: int, columns: int, *, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)
