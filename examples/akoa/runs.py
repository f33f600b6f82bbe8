"""What a run's folder says about itself: run.json, which training wrote beside the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from examples.akoa.inference import picture_size
from examples.akoa.labels import Row

WEIGHTS = "weights"
RECORD = "run.json"


def read_record(run: Path) -> dict[str, Any]:
    """What the run was asked for; empty where the folder holds no run.json.

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
        raise ValueError(f"{path}: holds no record of a run")
    return record


def trained_size(weights: Path, model: nn.Module) -> tuple[int, int]:
    """Height and width of the pictures that weights were trained on, in pixels.

    From the run.json beside the folder of weights, or else from the model itself.

    Raises:
        ValueError: neither tells.
    """
    size = read_record(weights.resolve().parent).get("size")
    return (int(size[0]), int(size[1])) if size else picture_size(model)


def check_rows(run: Path, rows: Sequence[Row]) -> None:
    """See that labels are those of the run: others may test on patients that it trained on.

    Raises:
        ValueError: they are not, or the run does not say which it had.
    """
    known = read_record(run).get("rows")
    if known is None:
        raise ValueError(f"{run / RECORD}: does not say which rows the run had, so its test set is not known")
    if known != digest(rows):
        raise ValueError(
            f"labels: are not those that {run} was trained with, so their test patients may be ones that it has "
            "seen; give the same file and fold"
        )


def digest(rows: Sequence[Row]) -> str:
    """A fingerprint of rows, as training writes it into run.json."""
    return sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()
