"""Record of a training run, run.json, which training writes beside the folder of the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation.inference import image_size
from perceiver_core.atomic_files import write_atomically

WEIGHTS = "weights"
RECORD = "run.json"


def read_record(run: Path) -> dict[str, Any]:
    """Read run.json. The result is empty if the folder has none.

    It contains the options of the run and a digest of its rows, and after the training also a digest of the weights.

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


def write_record(run: Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    write_atomically({run / RECORD: json.dumps(record, indent=2) + "\n"})


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
            f"labels: are not those that {run} was trained with, so it may have been trained on their test patients; "
            "pass the same file and fold"
        )


def check_weights(run: Path, model: nn.Module) -> None:
    """Check that weights are those that the training of a run has saved.

    A run whose training was interrupted before run.json was completed, or that an older version wrote, is not checked.

    Raises:
        ValueError: The weights are those of another run.
    """
    recorded = read_record(run).get("weights_sha256", "")
    if recorded and recorded != weights_digest(model):
        raise ValueError(
            f"{run / WEIGHTS}: are not the weights that the training of this run has saved, so they may have been "
            "trained on its test patients; put the saved weights back, or evaluate these in the folder of their own run"
        )


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 digest of the names, types, shapes and values of all parameters and buffers of a model."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rows_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows, as training writes it into run.json."""
    return sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()
