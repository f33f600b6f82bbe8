"""Knees, splits and a model with known answers, for the tests of the evaluation."""

import numpy as np
import torch
from torch import Tensor, nn

from examples.akoa.dataset.datamodule import Split
from examples.akoa.dataset.labels import Row
from examples.akoa.evaluation import predictions

HEIGHT, WIDTH, SLICES = 23, 19, 3
PATIENTS = {"train": 11, "val": 4, "test": 5}


class Bright(nn.Module):
    """Predicts "right" if the right half is brighter; in training mode, the opposite."""

    def __init__(self, gain: float = 3.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        margin = x[..., -half:].mean((1, 2, 3)) - x[..., :half].mean((1, 2, 3))
        return (-1 if self.training else 1) * self.gain * margin[:, None]


def row(patient: int, side: str = "right", slice_: int = 0, split: str = "test", visit: int = 3) -> Row:
    name = f"OAI{patient:07}_BaseLine_{visit}_de3d1_SAG_3D_DESS_WE_{side.upper()}.nii.gz_{slice_}.png"
    return Row(f"AKOA_Analysis/{name}", f"{patient:07}", visit, side, slice_, split)


def split_of(part: str, first: int, patients: int, seed: int) -> Split:
    """Noise images with one half brighter; every second patient has one knee that is hard to classify."""
    rng = np.random.default_rng(seed)
    rows = [
        row(first + i, side, k, part)
        for i in range(patients)
        for side in (("left", "right") if i % 2 else ("right",) if i % 4 else ("left",))
        for k in range(SLICES)
    ]
    ramp = np.linspace(-1, 1, WIDTH)
    signs = np.array([1 if row.side == "right" else -1 for row in rows])[:, None, None]
    noise = rng.normal(120, 25, (len(rows), HEIGHT, WIDTH)) + 18 * rng.normal(size=(len(rows), 1, 1)) * ramp
    pictures = np.clip(noise + 20 * signs * ramp, 0, 255).astype(np.uint8)
    return Split(rows, torch.from_numpy(pictures))


def sample(seed: int = 0, patients: int = 7, size: int = 61, spread: float = 2.0) -> predictions.Sample:
    rng = np.random.default_rng(seed)
    right = rng.random(size) < 0.6
    logits = np.round(spread * rng.normal(size=size) + np.where(right, 1, -1), 1)  # rounded, so that some tie
    return predictions.Sample(right, logits, np.append(np.arange(patients), rng.integers(0, patients, size - patients)))
