"""Predictions as logits beside their labels, by slice, by volume and by patient.

A *slice* is an image. A *volume* is one patient, visit and side; its logit is the mean over its slices. A *patient* is
correct if all volumes are, of all knees and visits. Patients are the independent samples, while slices of one patient
are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64, Integer

from examples.akoa.dataset import tables
from examples.akoa.dataset.labels import HEADER, Row

PERCEIVER = "perceiver"
LINEAR = "linear"
LINEAR_MIRRORED = "linear_mirrored"
MAJORITY = "majority"
MODELS = (PERCEIVER, LINEAR, LINEAR_MIRRORED, MAJORITY)

Volume = tuple[str, int, str]
"""Patient, visit and side."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Predictions at one level.

    Attributes:
        right: True sides, True for right.
        logits: Logits, positive for right.
        patients: Patient of each prediction, numbered from 0.
    """

    right: Bool[np.ndarray, " n"]
    logits: Float64[np.ndarray, " n"]
    patients: Integer[np.ndarray, " n"]

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """True for each correct prediction; a logit of 0 counts as left."""
        return (self.logits > 0) == self.right

    @property
    def probabilities(self) -> Float64[np.ndarray, " n"]:
        """Probability of right."""
        return probability(self.logits)

    @property
    def num_patients(self) -> int:
        """Number of patients."""
        return int(self.patients.max()) + 1


def probability(logits: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Probability of right: the logistic function."""
    return torch.as_tensor(logits, dtype=torch.float64).sigmoid().numpy()


def by_slice(rows: Sequence[Row], logits: Float64[np.ndarray, " n"]) -> Sample:
    """Predictions as they are, one for each slice."""
    right = np.array([row.side == "right" for row in rows])
    names = np.array([row.patient for row in rows])
    return Sample(right, np.asarray(logits), np.unique(names, return_inverse=True)[1])


def by_volume(rows: Sequence[Row], logits: Float64[np.ndarray, " n"]) -> Sample:
    """One prediction for each volume, in the order of `volume_keys`: the mean logit of its slices."""
    keys = volume_keys(rows)
    position = {key: i for i, key in enumerate(keys)}
    volumes = np.array([position[volume_of(row)] for row in rows])
    means = np.bincount(volumes, np.asarray(logits)) / np.bincount(volumes)
    right = np.array([side == "right" for _, _, side in keys])
    names = np.array([patient for patient, _, _ in keys])
    return Sample(right, means, np.unique(names, return_inverse=True)[1])


def volume_of(row: Row) -> Volume:
    """Volume of a slice."""
    return row.patient, row.visit, row.side


def volume_keys(rows: Sequence[Row]) -> list[Volume]:
    """Volumes of the rows, sorted."""
    return sorted({volume_of(row) for row in rows})


def patients_correct(sample: Sample) -> Bool[np.ndarray, " patients"]:
    """True for each patient all of whose predictions are correct; `sample` is by volume."""
    wrong = np.bincount(sample.patients, ~sample.correct, minlength=sample.num_patients)
    return wrong == 0


def to_csv(rows: Sequence[Row], logits: Mapping[str, Float64[np.ndarray, " n"]]) -> str:
    """Return the text of predictions.csv.

    The columns are those of labels.csv, then logit and probability of the Perceiver, then the logit of each baseline.

    Args:
        rows: Labels of n images.
        logits: Logits of each of `MODELS`.
    """
    others = [name for name in MODELS if name != PERCEIVER]
    header = (*HEADER, "logit", "probability", *(f"logit_{name}" for name in others))
    columns = [
        logits[PERCEIVER],
        probability(logits[PERCEIVER]),
        *(logits[name] for name in others),
    ]
    lines = zip(rows, *columns, strict=True)
    return tables.to_csv(
        header, ([*asdict(row).values(), *(f"{value:.9g}" for value in values)] for row, *values in lines)
    )


def read_predictions(path: Path) -> tuple[list[Row], dict[str, Float64[np.ndarray, " n"]]]:
    """Read the rows and logits of a file with the text of `to_csv`.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is not such a table, a column is missing, or a value is not a number.
    """
    columns = {name: "logit" if name == PERCEIVER else f"logit_{name}" for name in MODELS}
    lines = [line for _, line in tables.read_table(path, (*HEADER, *columns.values()))]
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
        logits = {name: np.array([float(line[column]) for line in lines]) for name, column in columns.items()}
    except ValueError as error:
        raise ValueError(f"{path}: was not written by examples.akoa.evaluate: {error!r}") from error
    return rows, logits
