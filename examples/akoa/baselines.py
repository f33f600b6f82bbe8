"""What a Perceiver has to beat: the majority class, and a linear model on pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from examples.akoa.data import Split

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties that are tried, the strongest first: each fit starts from the one before."""
LARGEST = 64
"""Pixels a side. Larger pictures are averaged down: at full size the fit would take gigabytes."""
BORDER = 0.1
"""The share of height and width that is border, on each side."""
_STEPS = 200

See = Callable[[UInt8[Tensor, "n h w"]], UInt8[Tensor, "n h w"]]


@dataclass(frozen=True, eq=False)
class Linear:
    """Logistic regression on standardized pixels, as it was chosen on the validation pictures."""

    scaler: StandardScaler
    classifier: LogisticRegression
    validation_loss: float
    converged: bool

    def logits(self, pictures: UInt8[Tensor, "n h w"]) -> Float64[np.ndarray, " n"]:
        """The logit of each picture, positive = right."""
        if not len(pictures):
            return np.empty(0)
        seen = self.scaler.transform(_pixels(pictures))
        logits: Float64[np.ndarray, " n"] = self.classifier.decision_function(seen)
        return logits.astype(np.float64)

    def describe(self) -> dict[str, float | bool]:
        """What was chosen."""
        return {
            "inverse_penalty": float(self.classifier.C),
            "validation_log_loss": self.validation_loss,
            "converged": self.converged,
        }


def fit_linear(train: Split, val: Split, *, mirrored: bool, progress: bool = False) -> Linear:
    """Fit on the training pictures, with the penalty that has the least loss on validation.

    Args:
        train: what is fit, at least one picture of each side.
        val: what chooses the penalty; is not fit.
        mirrored: fit also the mirror image of each training picture, as of the other side. A model
            trained with such pictures should be compared with a baseline that was.
        progress: show a bar.

    Raises:
        ValueError: the training pictures are of one side only.
    """
    sides, pictures = _sides(train), train.pictures
    if len(np.unique(sides)) < 2:
        raise ValueError("train: all pictures are of one side, so there is nothing to tell apart")
    if mirrored:
        sides, pictures = np.append(sides, ~sides), torch.cat([pictures, mirror(pictures)])
    scaler = StandardScaler(copy=False)
    pixels = scaler.fit_transform(_pixels(pictures))
    seen, truth = scaler.transform(_pixels(val.pictures)), _sides(val)
    best: Linear | None = None
    model = LogisticRegression(max_iter=_STEPS, warm_start=True)
    for strength in tqdm(STRENGTHS, "linear", unit="penalty", disable=None if progress else True):
        converged = _fit(model.set_params(C=strength), pixels, sides)
        loss = float(log_loss(truth, model.predict_proba(seen), labels=[False, True]))
        if best is None or loss < best.validation_loss:
            # A copy, since the next fit writes into the model that it starts from.
            best = Linear(scaler, deepcopy(model), loss, converged)
    assert best is not None  # there are strengths
    return best


def majority(train: Split, count: int) -> Float64[np.ndarray, " n"]:
    """The same logit for every picture: the log-odds of right among the training pictures."""
    right = int(_sides(train).sum())
    # One more of each side, so that a training set of one side has no infinite odds.
    return np.full(count, np.log((right + 1) / (len(train.rows) - right + 1)))


def mirror(pictures: UInt8[Tensor, "n h w"]) -> UInt8[Tensor, "n h w"]:
    """Left and right exchanged: a knee of the other side."""
    return pictures.flip(-1)


def without_border(pictures: UInt8[Tensor, "n h w"]) -> UInt8[Tensor, "n h w"]:
    """The outer tenth on each side is black.

    Black, not the picture's mean: it is what the scanner and resampling put there anyway, and it
    carries nothing from the rest of the picture.
    """
    inside = _inside(pictures)
    return torch.where(inside, pictures, torch.zeros_like(pictures))


def border_only(pictures: UInt8[Tensor, "n h w"]) -> UInt8[Tensor, "n h w"]:
    """All but the outer tenth on each side is black."""
    inside = _inside(pictures)
    return torch.where(inside, torch.zeros_like(pictures), pictures)


def seen_as(split: Split, see: See) -> Split:
    """The split with its pictures changed."""
    return replace(split, pictures=see(split.pictures))


def _inside(pictures: UInt8[Tensor, "n h w"]) -> Tensor:
    height, width = pictures.shape[-2:]
    down, across = max(1, round(BORDER * height)), max(1, round(BORDER * width))
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[down : height - down, across : width - across] = True
    return inside


def _fit(model: LogisticRegression, pixels: np.ndarray, sides: np.ndarray) -> bool:
    """Whether the fit converged. One that did not is used as it is, and the report says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(pixels, sides)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _sides(split: Split) -> np.ndarray:
    return np.array([row.side == "right" for row in split.rows])


def _pixels(pictures: UInt8[Tensor, "n h w"]) -> Float32[np.ndarray, "n d"]:
    height, width = pictures.shape[-2:]
    if max(height, width) <= LARGEST:
        return pictures.flatten(1).float().numpy()
    size = (min(height, LARGEST), min(width, LARGEST))
    # In pieces: all pictures as floats at full size would be four times the data set.
    pieces = [interpolate(p[:, None].float(), size, mode="area") for p in torch.split(pictures, 512)]
    return torch.cat(pieces).flatten(1).numpy()
