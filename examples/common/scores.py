"""Bootstrap intervals of test scores, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Rows = Mapping[str, Mapping[str, float]]
"""Mean, low and high of each row, by the name of the row."""


def interval(values: Tensor, *, resamples: int = 2000) -> dict[str, float]:
    """Mean of the values with its 95 % bootstrap interval, as `mean`, `low` and `high`."""
    values = values.double()
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def compare(scores: Mapping[str, Tensor], *, ours: str, best: Callable[..., str] = max) -> dict[str, dict[str, float]]:
    """Intervals of each method's scores, and of the paired difference to the best baseline.

    Args:
        scores: Score of each test sample, `n`, by the name of the method. Names that begin with "Perceiver" are no
            baselines.
        ours: Name of the method that is compared with the best baseline.
        best: `max` if higher scores are better, `min` if lower scores are.

    Returns:
        A row for each method, then the row of the difference.
    """
    rows = {name: interval(row) for name, row in scores.items()}
    baseline = best((name for name in scores if not name.startswith("Perceiver")), key=lambda name: rows[name]["mean"])
    return {**rows, f"{ours} less {baseline}": interval(scores[ours] - scores[baseline])}


def format_number(x: float) -> str:
    """Number with two decimals; negative zero loses its sign."""
    return f"{round(x, 2) + 0.0:.2f}"


def markdown_table(rows: Rows, unit: str) -> str:
    """Rows as an aligned Markdown table.

    Args:
        rows: Rows of `compare`.
        unit: Title of the column of means.
    """
    cells = [
        (name, format_number(row["mean"]), f"{format_number(row['low'])} to {format_number(row['high'])}")
        for name, row in rows.items()
    ]
    cells = [("", unit, "95 % interval"), *cells]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    lines = [f"| {name:<{widths[0]}} | {mean:>{widths[1]}} | {span:>{widths[2]}} |" for name, mean, span in cells]
    lines.insert(1, f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 1)}:|")
    return "\n".join(lines)
