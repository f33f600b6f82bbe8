"""Classification of point clouds: 300 to 450 points of a surface, with random rotation, noise and outliers.

There are ten types of surfaces and curves, each with random proportions, so that no type has a single profile of
distances. The clouds of a batch have different sizes: they are padded, and a mask marks the valid points.

    python -m examples.point_clouds --out examples/results/point_clouds

The baselines are invariant to rotation: random forests on histograms of the distances to the centroid, and of those
between all pairs of points (Osada et al. 2002, Shape distributions, D2).

Reference: Jaegle et al. 2021 (Perceiver), section 4.3, classifies ModelNet40 in this way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import compare, markdown_table

MIN_POINTS, MAX_POINTS = 300, 450  # points of a cloud
NOISE = 0.04  # deviation of each coordinate, where the farthest point of a shape is at distance 1 from its centroid
MAX_OUTLIERS = 0.25  # largest share of points that lie anywhere in the ball around the shape
STEPS = 1500
TRAIN, TEST = 0, 1  # first number of the seed of each cloud

Sampler = Callable[[np.random.Generator, int], np.ndarray]


def _columns(*columns: ArrayLike) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def sphere(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a sphere uniformly."""
    x = rng.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ellipsoid(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample an ellipsoid whose half axes differ by at least 0.1."""
    return sphere(rng, n) * [1, rng.uniform(0.6, 0.8), rng.uniform(0.3, 0.5)]


def cube(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample the six faces of a box that is nearly a cube."""
    x, side = rng.uniform(-1, 1, (n, 3)), rng.integers(3, size=n)
    x[np.arange(n), side] = np.sign(x[np.arange(n), side])
    return x * rng.uniform(0.8, 1, 3)


def cylinder(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a tube without end caps."""
    angle = rng.uniform(0, 2 * np.pi, n)
    return _columns(np.cos(angle), np.sin(angle), rng.uniform(0.8, 1.8) * rng.uniform(-1, 1, n))


def cone(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a cone uniformly from apex to rim."""
    angle, radius = rng.uniform(0, 2 * np.pi, n), np.sqrt(rng.uniform(0, 1, n))
    return _columns(radius * np.cos(angle), radius * np.sin(angle), rng.uniform(1, 2.5) * radius)


def torus(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a torus."""
    angle, around = rng.uniform(0, 2 * np.pi, (2, n))
    thick = rng.uniform(0.2, 0.5)
    radius = 1 + thick * np.cos(around)
    return _columns(radius * np.cos(angle), radius * np.sin(angle), thick * np.sin(around))


def helix(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a helix of two to four turns, left- or right-handed."""
    along = rng.uniform(-1, 1, n)
    angle = rng.choice([-1, 1]) * rng.uniform(2, 4) * np.pi * along
    return _columns(np.cos(angle), np.sin(angle), rng.uniform(0.8, 1.8) * along)


def planes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample two squares that intersect in a line, at an angle of 50 to 90 degrees."""
    x, y = rng.uniform(-1, 1, (2, n))
    angle = np.where(rng.random(n) < 0.5, 0, rng.uniform(50, 90) * np.pi / 180)
    return _columns(x * np.cos(angle), x * np.sin(angle), y * rng.uniform(0.6, 1))


def moebius(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a Möbius strip, which has a single side."""
    angle, across = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.3, 0.6) * rng.uniform(-1, 1, n)
    radius = 1 + across * np.cos(angle / 2)
    return _columns(radius * np.cos(angle), radius * np.sin(angle), across * np.sin(angle / 2))


def trefoil(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sample a trefoil, the simplest knot."""
    angle, flat = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.6, 1.4)
    x, y = np.sin(angle) + 2 * np.sin(2 * angle), np.cos(angle) - 2 * np.cos(2 * angle)
    return _columns(x, y, -flat * np.sin(3 * angle))


SHAPES: tuple[Sampler, ...] = (sphere, ellipsoid, cube, cylinder, cone, torus, helix, planes, moebius, trefoil)
NAMES = [shape.__name__ for shape in SHAPES]


class Clouds(NamedTuple):
    """Point clouds `n 3` of different sizes, and the class of each."""

    points: list[Tensor]
    labels: Tensor


def cloud(rng: np.random.Generator, label: int) -> Tensor:
    """Sample a cloud of one class: rotated, with noise and outliers, centered, scaled to radius 1."""
    n = int(rng.integers(MIN_POINTS, MAX_POINTS + 1))
    num_outliers = int(n * rng.uniform(0, MAX_OUTLIERS))
    x = _normalize(SHAPES[label](rng, n - num_outliers)) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    x = x + NOISE * rng.normal(size=x.shape)
    outliers = sphere(rng, num_outliers) * rng.uniform(0, 1, (num_outliers, 1)) ** (1 / 3)
    return torch.tensor(_normalize(np.concatenate([x, outliers])), dtype=torch.float32)


def _normalize(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=1).max()


def generate(split: int, count: int) -> Clouds:
    """Generate clouds of all classes in turn, each with a seed of its own that no other split uses."""
    labels = torch.arange(count) % len(SHAPES)
    return Clouds([cloud(np.random.default_rng([split, i]), int(labels[i])) for i in range(count)], labels)


def build() -> pc.Perceiver:
    """Build the model from up to 450 points to ten logits, with 32 latents."""
    points = pc.adapters.PointCloud(positions=pc.positions.Fourier(num_axes=3, num_bands=8, max_resolution=12))
    read = partial(pc.CrossAttend, num_heads=8, attention=partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128))
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(
        points.dim,
        num_latents=32,
        dim=128,
        num_reads=2,
        depth=2,
        num_heads=4,
        cross_attention=read,
        latent_transformer=transformer,
    )
    return pc.Perceiver(points, encoder, pc.heads.Classification(encoder.dim, num_classes=len(SHAPES)))


def loss(model: nn.Module, clouds: Clouds, batch: int = 64) -> Tensor:
    """Cross-entropy on a random batch of clouds, each rotated at random."""
    chosen = torch.randint(len(clouds.labels), (batch,)).tolist()
    points, mask = pc.adapters.pad_point_clouds([clouds.points[i] for i in chosen])
    rotations = torch.linalg.qr(torch.randn(batch, 3, 3))[0]
    return F.cross_entropy(model(points @ rotations, mask=mask), clouds.labels[chosen], label_smoothing=0.05)


@torch.no_grad()
def predict(model: nn.Module, clouds: Clouds) -> Tensor:
    """Class that the model predicts for each cloud."""
    batches = (pc.adapters.pad_point_clouds(clouds.points[i : i + 100]) for i in range(0, len(clouds.points), 100))
    return torch.cat([model(points, mask=mask).argmax(-1) for points, mask in batches])


def centroid_histogram(points: Tensor) -> np.ndarray:
    """Histogram of the distances to the centroid."""
    return np.histogram(points.norm(dim=-1), bins=32, range=(0, 1))[0] / len(points)


def pair_histogram(points: Tensor) -> np.ndarray:
    """Histogram of the distances between all pairs of points."""
    return np.histogram(torch.pdist(points), bins=64, range=(0, 2))[0] / len(points) ** 2


def forest(features: Callable[[Tensor], np.ndarray], train_set: Clouds, test_set: Clouds) -> Tensor:
    """Classes that a random forest predicts from features of the test clouds."""
    from sklearn.ensemble import RandomForestClassifier

    x, x_test = (np.stack([features(points) for points in clouds.points]) for clouds in (train_set, test_set))
    return torch.tensor(RandomForestClassifier(300, random_state=0).fit(x, train_set.labels.numpy()).predict(x_test))


def draw(clouds: Clouds, predicted: Tensor) -> Figure:
    """Plot a cloud of each class, and the confusion matrix."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.1))
    for i, name in enumerate(NAMES):
        axes = left.add_subplot(2, 5, i + 1, projection="3d")
        axes.scatter(*clouds.points[i].T.numpy(), s=3, c=clouds.points[i][:, 2].numpy(), cmap="viridis")
        axes.set_title(f"{name}\npredicted {NAMES[predicted[i]]}", fontsize=9)
        axes.set_axis_off()
        axes.set_box_aspect((1, 1, 1), zoom=1.5)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    counts = torch.zeros(len(NAMES), len(NAMES), dtype=torch.int64)
    counts.index_put_((clouds.labels, predicted), torch.ones_like(predicted), accumulate=True)
    axes = right.subplots()
    axes.imshow(counts.float().sqrt().numpy(), cmap="Blues")
    for row, column in counts.nonzero().tolist():
        color = "white" if row == column else "black"
        axes.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(NAMES)), NAMES, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(NAMES)), NAMES, fontsize=8)
    axes.set(title="test clouds: true class by row, predicted by column")
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train the model, compare it with the baselines, and write result and figure."""
    run = Run("point_clouds", __doc__, arguments)
    train_set, test_set = generate(TRAIN, 200 if run.toy else 8000), generate(TEST, 100 if run.toy else 1000)
    model = run.train("Perceiver", build(), partial(loss, clouds=train_set), steps=3 if run.toy else STEPS)
    outputs = {
        "chance": test_set.labels[torch.randperm(len(test_set.labels), generator=torch.Generator().manual_seed(0))],
        "random forest, distances to the centroid": forest(centroid_histogram, train_set, test_set),
        "random forest, distances of all pairs": forest(pair_histogram, train_set, test_set),
        "Perceiver": predict(model, test_set),
    }
    correct = {name: 100.0 * (predicted == test_set.labels) for name, predicted in outputs.items()}
    rows = compare(correct, ours="Perceiver")
    print(markdown_table(rows, "correct, %"))
    sizes = {"train": len(train_set.labels), "test": len(test_set.labels), "classes": NAMES}
    return run.finish(draw(test_set, outputs["Perceiver"]), tables={"correct, %": rows}, data=sizes)


if __name__ == "__main__":
    sys.exit(run_command(main))
