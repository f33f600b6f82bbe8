"""Where results go: a Markdown table to read, JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Results, Row


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; what a row has no figure for stays empty."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    cells = [list(columns), *([text(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def text(value: object) -> str:
    """Three digits of a number, more before the point; anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(name: str, results: Results, *, machine: dict[str, Any], ceilings: Row, folder: Path) -> Path:
    """Writes results as JSON, with the machine and its ceilings."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "machine": machine, "ceilings": ceilings, **results._asdict()}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
