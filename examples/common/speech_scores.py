"""Baselines and figure of the spoken words, and results that an interrupted run keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from examples.common.speech import RATE, WORDS, Speech, Split
from perceiver_core.atomic_files import write_atomically

Spectrogram = Callable[[Tensor, Tensor], Tensor]
"""Function from waveforms `b samples` and their lengths to spectrograms `b frames bands`."""


def resumed(path: Path, resume: bool, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Compute a result, store it in a file and return it. With `resume`, return the stored result of an earlier run."""
    if not resume or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({path: json.dumps(compute())})
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


def baselines(speech: Speech, spectrogram: Spectrogram) -> dict[str, Callable[[Split], Tensor]]:
    """Functions that fit a scikit-learn model on a split, and return the words it predicts for the test recordings.

    The spectrograms are resized to 32 frames for the logistic regression, and padded or cut to 65 frames for the
    support vector machine. These were the better choices on recordings held out of the training set.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    def fit_predict(x: np.ndarray, model: Any, split: Split) -> Tensor:
        fitted = make_pipeline(StandardScaler(), model).fit(x[split.train], speech.labels[split.train].numpy())
        return torch.tensor(fitted.predict(x[split.test]))

    images = [
        spectrogram(one.samples, one.lengths).mT for one in map(speech.__getitem__, torch.arange(len(speech))[:, None])
    ]
    mean = torch.cat([image.mean(2) for image in images]).numpy()
    resized = torch.cat([F.interpolate(image, 32, mode="linear") for image in images]).flatten(1).numpy()
    padded = torch.cat([F.pad(image, (0, 65))[..., :65] for image in images]).flatten(1).numpy()
    gamma = 0.3 / padded.shape[1]  # a wider kernel than the default
    return {
        "logistic regression, mean spectrum": partial(fit_predict, mean, LogisticRegression(C=0.1, max_iter=300)),
        "logistic regression, log-mel": partial(fit_predict, resized, LogisticRegression(C=0.1, max_iter=300)),
        "support vector machine, log-mel": partial(fit_predict, padded, SVC(C=10, gamma=gamma)),
    }


def draw(speech: Speech, spectrogram: Spectrogram, correct: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Plot the spectrogram of a recording of each word, and the accuracy of each method and seed in each split.

    Args:
        speech: All recordings.
        spectrogram: Function that computes the spectrograms.
        correct: Scores `seeds n` of the test recordings, in percent, by split and by method.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.4))
    for word, axes in enumerate(left.subplots(2, 5).flat):
        one = speech[(speech.labels == word).nonzero()[0]]
        image = spectrogram(one.samples, one.lengths)[0].mT.numpy()
        extent = (0, int(one.lengths) / RATE, 0, len(image))
        axes.imshow(image, origin="lower", aspect="auto", cmap="magma", extent=extent)
        axes.set_title(str(word) if speech.speakers else WORDS[word], fontsize=10)
    left.supxlabel("seconds", fontsize=9)
    left.supylabel("mel band", fontsize=9)
    axes = right.subplots()
    names = list(dict.fromkeys(name for scores in correct.values() for name in scores))
    for row, name in enumerate(names):
        points = [
            (column + 0.8 * ((row + 0.5) / len(names) - 0.5), seed.mean().item())
            for column, scores in enumerate(correct.values())
            for seed in scores.get(name, ())
        ]
        axes.scatter(*zip(*points, strict=True), s=16, label=name)
    axes.set_xticks(range(len(correct)), [name.replace(" ", "\n") for name in correct], fontsize=8)
    axes.set(ylim=(0, 103), ylabel="recognized, % of test recordings; one point per seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure
