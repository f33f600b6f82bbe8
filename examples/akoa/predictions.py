"""Logits beside their labels: the table of predictions, and its three levels.

A *slice* is a picture. A *volume* is one patient, visit and side; its logit is the mean over its
slices. A *patient* is right when all volumes are, of all knees and visits.
Patients are the sample: slices of one patient are no independent observations.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64, Integer

from examples.akoa.labels import HEADER, Row, write_table

PERCEIVER = "perceiver"
LINEAR = "linear"
LINEAR_MIRRORED = "linear_mirrored"
MAJORITY = "majority"
MODELS = (PERCEIVER, LINEAR, LINEAR_MIRRORED, MAJORITY)

Volume = tuple[str, int, str]
"""Patient, visit, side."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Verdicts at one level: true sides (True = right), logits, and whose they are (0 to P-1)."""

    right: Bool[np.ndarray, " n"]
    logits: Float64[np.ndarray, " n"]
    patients: Integer[np.ndarray, " n"]

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """Whether each verdict is right; a logit of 0 counts as left."""
        return (self.logits > 0) == self.right

    @property
    def probabilities(self) -> Float64[np.ndarray, " n"]:
        """p(right)."""
        return probability(self.logits)

    @property
    def count(self) -> int:
        """How many patients."""
        return int(self.patients.max()) + 1


def probability(logits: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """p(right): the logistic function."""
    p: Float64[np.ndarray, " n"] = torch.as_tensor(logits, dtype=torch.float64).sigmoid().numpy()
    return p


def slices(rows: Sequence[Row], logits: Float64[np.ndarray, " n"]) -> Sample:
    """The predictions as they are, one a picture."""
    right = np.array([row.side == "right" for row in rows])
    names = np.array([row.patient for row in rows])
    return Sample(right, np.asarray(logits), np.unique(names, return_inverse=True)[1])


def volumes(rows: Sequence[Row], logits: Float64[np.ndarray, " n"]) -> Sample:
    """One verdict a volume, in the order of `volume_keys`: the mean logit of its slices."""
    keys = volume_keys(rows)
    place = {key: i for i, key in enumerate(keys)}
    of = np.array([place[volume_of(row)] for row in rows])
    means = np.bincount(of, np.asarray(logits)) / np.bincount(of)
    right = np.array([side == "right" for _, _, side in keys])
    names = np.array([patient for patient, _, _ in keys])
    return Sample(right, means, np.unique(names, return_inverse=True)[1])


def volume_of(row: Row) -> Volume:
    """The volume that a slice is of."""
    return row.patient, row.visit, row.side


def volume_keys(rows: Sequence[Row]) -> list[Volume]:
    """The volumes of the rows, sorted."""
    return sorted({volume_of(row) for row in rows})


def patients_correct(sample: Sample) -> Bool[np.ndarray, " patients"]:
    """Whether all verdicts of each patient are right; give it volumes."""
    wrong = np.bincount(sample.patients, ~sample.correct, minlength=sample.count)
    return wrong == 0


def write_predictions(path: Path, rows: Sequence[Row], logits: Mapping[str, Float64[np.ndarray, " n"]]) -> None:
    """Write predictions.csv, whole or not at all.

    The columns: those of labels.csv, then logit and probability of the Perceiver, then the logit of
    each baseline.

    Args:
        path: where to.
        rows: n labels.
        logits: of each of `MODELS`.
    """
    others = [name for name in MODELS if name != PERCEIVER]
    header = (*HEADER, "logit", "probability", *(f"logit_{name}" for name in others))
    columns = [
        logits[PERCEIVER],
        probability(logits[PERCEIVER]),
        *(logits[name] for name in others),
    ]
    lines = (
        [*asdict(row).values(), *(f"{value:.9g}" for value in values)]
        for row, *values in zip(rows, *columns, strict=True)
    )
    write_table(path, header, lines)


def read_predictions(path: Path) -> tuple[list[Row], dict[str, Float64[np.ndarray, " n"]]]:
    """The rows and logits that `write_predictions` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a value is no number.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    names = {n: "logit" if n == PERCEIVER else f"logit_{n}" for n in MODELS}
    try:
        rows = [
            Row(
                image=line["image"],
                patient=line["patient"],
                visit=int(line["visit"]),
                side=line["side"],
                slice=int(line["slice"]),
                split=line["split"],
            )
            for line in lines
        ]
        logits = {n: np.array([float(line[at]) for line in lines]) for n, at in names.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: was not written by examples.akoa.evaluate: {error!r}") from error
    return rows, logits
