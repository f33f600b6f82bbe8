"""What could not be measured, in words, so that one candidate that fails takes nothing from the others."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

LONGEST = 100  # characters
FAILED, REFUSED = "failed: ", "refused: "


def words(error: Exception) -> str:
    """The kind of an error and the first line that it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:LONGEST]


def failed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The notes of rows that should have been measured; what a kernel was known to refuse is not among them."""
    return [f"{row['candidate']}: {row['note']}" for row in rows if str(row.get("note", "")).startswith(FAILED)]


def measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have figures."""
    return [row for row in rows if "note" not in row]


def clean() -> None:
    """Gives back what an error had kept: memory of the GPU above all."""
    gc.collect()
    with suppress(RuntimeError):  # where the error has taken the GPU with it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
