"""Baselines for comparison with the Perceiver: the majority class, and a linear model on pixels."""

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

from examples.akoa.dataset.datamodule import Split

INVERSE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate inverse penalties, the strongest penalty first: each fit starts from the previous one."""
MAX_SIZE = 64
"""Largest height and width in pixels; larger images are averaged, since the fit at full size would take gigabytes."""
BORDER = 0.1
"""Share of height and width that counts as border, on each side."""
_MAX_ITERATIONS = 200

Transform = Callable[[UInt8[Tensor, "n h w"]], UInt8[Tensor, "n h w"]]


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Logistic regression on standardized pixels, with the penalty selected on the validation images."""

    scaler: StandardScaler
    classifier: LogisticRegression
    validation_loss: float
    converged: bool

    def logits(self, images: UInt8[Tensor, "n h w"]) -> Float64[np.ndarray, " n"]:
        """Logit of each image, positive for right."""
        if not len(images):
            return np.empty(0)
        pixels = self.scaler.transform(_pixels(images))
        return self.classifier.decision_function(pixels).astype(np.float64)

    def describe(self) -> dict[str, float | bool]:
        """Selected penalty, its validation loss, and whether the fit converged, for the report."""
        return {
            "inverse_penalty": float(self.classifier.C),
            "validation_log_loss": self.validation_loss,
            "converged": self.converged,
        }


def fit_linear(train: Split, val: Split, *, mirrored: bool, progress: bool = False) -> LinearModel:
    """Fit a logistic regression on the training images, with the penalty of the lowest validation loss.

    Args:
        train: Training images, at least one of each side.
        val: Validation images, which select the penalty.
        mirrored: Add the mirror image of each training image, labeled as the other side. A model that is trained with
            mirrored images should be compared with such a baseline.
        progress: Show a progress bar.

    Raises:
        ValueError: All training images are of one side.
    """
    sides, images = _sides(train), train.images
    if len(np.unique(sides)) < 2:
        raise ValueError("train: all images are of one side; a classifier needs both")
    if mirrored:
        sides, images = np.append(sides, ~sides), torch.cat([images, mirror(images)])
    scaler = StandardScaler(copy=False)
    pixels = scaler.fit_transform(_pixels(images))
    val_pixels, truth = scaler.transform(_pixels(val.images)), _sides(val)
    best: LinearModel | None = None
    model = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    for inverse_penalty in tqdm(INVERSE_PENALTIES, "linear", unit="penalty", disable=None if progress else True):
        converged = _fit(model.set_params(C=inverse_penalty), pixels, sides)
        loss = float(log_loss(truth, model.predict_proba(val_pixels), labels=[False, True]))
        if best is None or loss < best.validation_loss:
            # A copy, since the next fit modifies the model that it starts from.
            best = LinearModel(scaler, deepcopy(model), loss, converged)
    assert best is not None  # since there is at least one penalty
    return best


def majority(train: Split, count: int) -> Float64[np.ndarray, " n"]:
    """Same logit for every image: the log-odds of right among the training images."""
    right = int(_sides(train).sum())
    # One is added to each count, so that a training set of one side has finite odds.
    return np.full(count, np.log((right + 1) / (len(train.rows) - right + 1)))


def mirror(images: UInt8[Tensor, "n h w"]) -> UInt8[Tensor, "n h w"]:
    """Exchange left and right, which makes knees of the other side."""
    return images.flip(-1)


def without_border(images: UInt8[Tensor, "n h w"]) -> UInt8[Tensor, "n h w"]:
    """Set the outer tenth on each side to black.

    Black is the value that the scanner and resampling leave there; the mean of the image would carry information from
    the rest of it.
    """
    inside = _inside(images)
    return torch.where(inside, images, torch.zeros_like(images))


def border_only(images: UInt8[Tensor, "n h w"]) -> UInt8[Tensor, "n h w"]:
    """Set all but the outer tenth on each side to black."""
    inside = _inside(images)
    return torch.where(inside, torch.zeros_like(images), images)


def transform_split(split: Split, transform: Transform) -> Split:
    """Return the split with transformed images."""
    return replace(split, images=transform(split.images))


def _inside(images: UInt8[Tensor, "n h w"]) -> Tensor:
    """Mask of the pixels that are not border."""
    height, width = images.shape[-2:]
    down, across = max(1, round(BORDER * height)), max(1, round(BORDER * width))
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[down : height - down, across : width - across] = True
    return inside


def _fit(model: LogisticRegression, pixels: np.ndarray, sides: np.ndarray) -> bool:
    """Fit the model and return whether the fit converged; the report marks fits that did not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(pixels, sides)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _sides(split: Split) -> np.ndarray:
    """Side of each image, True for right."""
    return np.array([row.side == "right" for row in split.rows])


def _pixels(images: UInt8[Tensor, "n h w"]) -> Float32[np.ndarray, "n d"]:
    """Images as vectors of pixels, averaged to at most `MAX_SIZE` pixels in height and width."""
    height, width = images.shape[-2:]
    if max(height, width) <= MAX_SIZE:
        return images.flatten(1).float().numpy()
    size = (min(height, MAX_SIZE), min(width, MAX_SIZE))
    # In chunks: all images as floats at full size would take four times the memory of the data set.
    chunks = [interpolate(p[:, None].float(), size, mode="area") for p in torch.split(images, 512)]
    return torch.cat(chunks).flatten(1).numpy()
