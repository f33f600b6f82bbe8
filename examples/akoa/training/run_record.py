"""Record of a training run, run.json, which training writes beside the folder of the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation.inference import image_size

WEIGHTS = "weights"
RECORD = "run.json"


def read_record(run: Path) -> dict[str, Any]:
    """Read run.json: the options of the run, and a digest of its rows; empty if the folder has none.

    Raises:
        ValueError: run.json is damaged.
    """
    path = run / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is no record of a run")
    return record


def trained_size(weights: Path, model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that weights were trained on, in pixels.

    They come from the run.json beside the folder of weights, or else from the model itself.

    Raises:
        ValueError: Neither contains the size.
    """
    size = read_record(weights.resolve().parent).get("size")
    return (int(size[0]), int(size[1])) if size else image_size(model)


def check_rows(run: Path, rows: Sequence[Row]) -> None:
    """Check that labels are those of the run; with other labels, test patients may be ones of its training.

    Raises:
        ValueError: The labels differ, or run.json does not contain the digest of its rows.
    """
    recorded = read_record(run).get("rows")
    if recorded is None:
        raise ValueError(f"{run / RECORD}: does not say which rows the run used, so its test set is unknown")
    if recorded != rows_digest(rows):
        raise ValueError(
            f"labels: are not those that {run} was trained with, so their test patients may be ones that it was "
            "trained on; give the same file and fold"
        )


def rows_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows, as training writes it into run.json."""
    return sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()
