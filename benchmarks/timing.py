"""Timing that is fair to what it compares, and where the results go."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def interleaved(contestants: dict[str, Callable[[], object]], *, rounds: int, device: str) -> dict[str, float]:
    """The median seconds of each contestant, one call of each a round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = (text.rjust(width) for text, width in zip(row, widths, strict=True))
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def save(name: str, rows: Sequence[dict[str, Any]], *, device: str, folder: Path) -> Path:
    """Writes rows as JSON, with what a reader needs to know about the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name() if device == "cuda" else device,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine, "rows": list(rows)}, indent=1) + "\n")
    return path
