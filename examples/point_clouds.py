"""Which surface were these points taken from? Clouds of 300 to 450 points, turned at random, with noise and strays.

Ten kinds of surfaces and curves, each with proportions of its own, so that no kind has one profile of distances. The
clouds of a batch have different sizes: they are padded, and a mask says which points are there.

    python -m examples.point_clouds --out examples/results/point_clouds

The baselines do not depend on the rotation: random forests on histograms of the distances to the centroid, and of
those between all pairs of points (Osada et al. 2002, Shape distributions, D2).

Reference: Jaegle et al. 2021 (Perceiver), section 4.3, does this to ModelNet40.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples import _run

FEWEST, MOST = 300, 450  # points of a cloud
NOISE = 0.04  # of each coordinate, where the farthest point of a shape is 1 from its centroid
STRAYS = 0.25  # up to this share of the points lie anywhere in the ball about the shape
STEPS = 1500
TRAIN, TEST = 0, 1  # what the seeds of a cloud begin with

Draw = Callable[[np.random.Generator, int], np.ndarray]


def _columns(*columns: Any) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def sphere(rng: np.random.Generator, n: int) -> np.ndarray:
    """Evenly over a sphere."""
    x = rng.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ellipsoid(rng: np.random.Generator, n: int) -> np.ndarray:
    """A sphere whose axes are at least a fifth apart."""
    return sphere(rng, n) * [1, rng.uniform(0.6, 0.8), rng.uniform(0.3, 0.5)]


def cube(rng: np.random.Generator, n: int) -> np.ndarray:
    """The six faces of a box, nearly a cube."""
    x, side = rng.uniform(-1, 1, (n, 3)), rng.integers(3, size=n)
    x[np.arange(n), side] = np.sign(x[np.arange(n), side])
    return x * rng.uniform(0.8, 1, 3)


def cylinder(rng: np.random.Generator, n: int) -> np.ndarray:
    """A tube without lids."""
    turn = rng.uniform(0, 2 * np.pi, n)
    return _columns(np.cos(turn), np.sin(turn), rng.uniform(0.8, 1.8) * rng.uniform(-1, 1, n))


def cone(rng: np.random.Generator, n: int) -> np.ndarray:
    """Evenly from the apex to the rim."""
    turn, far = rng.uniform(0, 2 * np.pi, n), np.sqrt(rng.uniform(0, 1, n))
    return _columns(far * np.cos(turn), far * np.sin(turn), rng.uniform(1, 2.5) * far)


def torus(rng: np.random.Generator, n: int) -> np.ndarray:
    """A ring of some thickness."""
    turn, around = rng.uniform(0, 2 * np.pi, (2, n))
    thick = rng.uniform(0.2, 0.5)
    far = 1 + thick * np.cos(around)
    return _columns(far * np.cos(turn), far * np.sin(turn), thick * np.sin(around))


def helix(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two to four turns of a spring, to the left or to the right."""
    along = rng.uniform(-1, 1, n)
    turn = rng.choice([-1, 1]) * rng.uniform(2, 4) * np.pi * along
    return _columns(np.cos(turn), np.sin(turn), rng.uniform(0.8, 1.8) * along)


def planes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two squares through one line, 50 to 90 degrees apart."""
    x, y = rng.uniform(-1, 1, (2, n))
    turn = np.where(rng.random(n) < 0.5, 0, rng.uniform(50, 90) * np.pi / 180)
    return _columns(x * np.cos(turn), x * np.sin(turn), y * rng.uniform(0.6, 1))


def moebius(rng: np.random.Generator, n: int) -> np.ndarray:
    """A band with one side."""
    turn, across = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.3, 0.6) * rng.uniform(-1, 1, n)
    far = 1 + across * np.cos(turn / 2)
    return _columns(far * np.cos(turn), far * np.sin(turn), across * np.sin(turn / 2))


def trefoil(rng: np.random.Generator, n: int) -> np.ndarray:
    """The simplest knot."""
    turn, flat = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.6, 1.4)
    x, y = np.sin(turn) + 2 * np.sin(2 * turn), np.cos(turn) - 2 * np.cos(2 * turn)
    return _columns(x, y, -flat * np.sin(3 * turn))


SHAPES: tuple[Draw, ...] = (sphere, ellipsoid, cube, cylinder, cone, torus, helix, planes, moebius, trefoil)
NAMES = [shape.__name__ for shape in SHAPES]


class Clouds(NamedTuple):
    """Clouds `n 3` of different sizes, and the numbers of their shapes."""

    points: list[Tensor]
    labels: Tensor


def cloud(rng: np.random.Generator, label: int) -> Tensor:
    """Points of one shape, turned, with noise and strays, centered, the farthest 1 away."""
    n = int(rng.integers(FEWEST, MOST + 1))
    stray = int(n * rng.uniform(0, STRAYS))
    x = _scaled(SHAPES[label](rng, n - stray)) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    x = x + NOISE * rng.normal(size=x.shape)
    anywhere = sphere(rng, stray) * rng.uniform(0, 1, (stray, 1)) ** (1 / 3)
    return torch.tensor(_scaled(np.concatenate([x, anywhere])), dtype=torch.float32)


def _scaled(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=1).max()


def generate(split: int, count: int) -> Clouds:
    """Clouds of all shapes in turn; each has a seed of its own, which no other split has."""
    labels = torch.arange(count) % len(SHAPES)
    return Clouds([cloud(np.random.default_rng([split, i]), int(labels[i])) for i in range(count)], labels)


def build() -> pc.Perceiver:
    """The model: up to 450 points to 32 latents, to ten logits."""
    points = pc.adapters.PointCloud(positions=pc.positions.Fourier(num_axes=3, num_bands=8, max_resolution=12))
    read = partial(pc.CrossAttend, num_heads=8, attention=partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128))
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(points.dim, num_latents=32, dim=128, num_reads=2, depth=2, num_heads=4, cross_attention=read, latent_transformer=process)
    return pc.Perceiver(points, encoder, pc.heads.Classification(encoder.dim, num_classes=len(SHAPES)))


def loss(model: nn.Module, clouds: Clouds, batch: int = 64) -> Tensor:
    """Cross-entropy of clouds drawn at random, each turned anew."""
    chosen = torch.randint(len(clouds.labels), (batch,)).tolist()
    points, mask = pc.adapters.pad_point_clouds([clouds.points[i] for i in chosen])
    turns = torch.linalg.qr(torch.randn(batch, 3, 3))[0]
    return F.cross_entropy(model(points @ turns, mask=mask), clouds.labels[chosen], label_smoothing=0.05)


@torch.no_grad()
def answers(model: nn.Module, clouds: Clouds) -> Tensor:
    """The number of the shape that the model sees in each cloud."""
    batches = (pc.adapters.pad_point_clouds(clouds.points[i : i + 100]) for i in range(0, len(clouds.points), 100))
    return torch.cat([model(points, mask=mask).argmax(-1) for points, mask in batches])


def from_centroid(points: Tensor) -> np.ndarray:
    """The histogram of distances to the centroid."""
    return np.histogram(points.norm(dim=-1), bins=32, range=(0, 1))[0] / len(points)


def between_pairs(points: Tensor) -> np.ndarray:
    """The histogram of distances between all pairs."""
    return np.histogram(torch.pdist(points), bins=64, range=(0, 2))[0] / len(points) ** 2


def forest(features: Callable[[Tensor], np.ndarray], seen: Clouds, unseen: Clouds) -> Tensor:
    """What a random forest on features of a cloud answers."""
    from sklearn.ensemble import RandomForestClassifier

    x, test = (np.stack([features(points) for points in clouds.points]) for clouds in (seen, unseen))
    return torch.tensor(RandomForestClassifier(300, random_state=0).fit(x, seen.labels.numpy()).predict(test))


def draw(clouds: Clouds, found: Tensor) -> Any:
    """A cloud of each shape, and what was taken for what."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.1))
    for i, name in enumerate(NAMES):
        axes = left.add_subplot(2, 5, i + 1, projection="3d")
        axes.scatter(*clouds.points[i].T.numpy(), s=3, c=clouds.points[i][:, 2].numpy(), cmap="viridis")
        axes.set_title(f"{name}\nseen as {NAMES[found[i]]}", fontsize=9)
        axes.set_axis_off()
        axes.set_box_aspect((1, 1, 1), zoom=1.5)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    counts = torch.zeros(len(NAMES), len(NAMES), dtype=torch.int64)
    counts.index_put_((clouds.labels, found), torch.ones_like(found), accumulate=True)
    axes = right.subplots()
    axes.imshow(counts.float().sqrt().numpy(), cmap="Blues")
    for row, column in counts.nonzero().tolist():
        color = "white" if row == column else "black"
        axes.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(NAMES)), NAMES, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(NAMES)), NAMES, fontsize=8)
    axes.set(title="test clouds: rows are, columns are seen as")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, compares, draws, and writes the result."""
    run = _run.Run("point_clouds", __doc__, arguments)
    seen, unseen = generate(TRAIN, 200 if run.toy else 8000), generate(TEST, 100 if run.toy else 1000)
    model = run.train("Perceiver", build(), partial(loss, clouds=seen), steps=3 if run.toy else STEPS)
    found = {
        "chance": unseen.labels[torch.randperm(len(unseen.labels), generator=torch.Generator().manual_seed(0))],
        "random forest, distances to the centroid": forest(from_centroid, seen, unseen),
        "random forest, distances of all pairs": forest(between_pairs, seen, unseen),
        "Perceiver": answers(model, unseen),
    }
    right = {name: 100.0 * (answer == unseen.labels) for name, answer in found.items()}
    rows = _run.compare(right, ours="Perceiver")
    print(_run.table(rows, "correct, %"))
    sizes = {"train": len(seen.labels), "test": len(unseen.labels), "classes": NAMES}
    return run.finish(draw(unseen, found["Perceiver"]), tables={"correct, %": rows}, data=sizes)


if __name__ == "__main__":
    main()
