"""Handwritten digits as point clouds of pixels, with the pixels in order and shuffled.

Each of the 8 x 8 pixels is a point (row, column, brightness). The same model is trained twice: with the pixels in
order, and with all pixels shuffled by one fixed permutation. A convolution needs its pixels in order. A Perceiver gets
the position of a pixel with its token, so the permutation changes nothing but the order in which tokens are summed.

    python -m examples.digits

Over seeds and orders the Perceiver recognizes 94.4 to 96.9 % of the 360 test digits, about 96 % on average; logistic
regression recognizes 90.0 %. One digit is 0.3 %, and both orders are the same training up to rounding.

Reference: Jaegle et al. 2021 (Perceiver), section 4.1 and table 2, makes this comparison on ImageNet.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import perceiver_core as pc
from examples.common import parse
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import output_folder
from examples.common.terminal import printable
from perceiver_core.atomic_files import write_atomically

NUM_TRAIN = 1437  # of 1,797 images; the last 360, by other writers, are the test
SIDE = 8
EPOCHS = 40


class Digits(NamedTuple):
    """Images `n 1 8 8` in [-1, 1] and their digits `n`."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Load scikit-learn's digits, which come with the package, as training set and test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    whole = Digits(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target))
    return Digits(*(x[:NUM_TRAIN] for x in whole)), Digits(*(x[NUM_TRAIN:] for x in whole))


def build() -> pc.Perceiver:
    """Build the model from 64 points to ten logits, with 16 latents."""
    points = pc.adapters.PointCloud(
        num_features=1, positions=pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=4)
    )
    mlp = partial(pc.MLP, widening_factor=2)
    attention = partial(pc.MultiHeadAttention, qk_dim=128)
    encoder = pc.Encoder(
        points.dim,
        num_latents=16,
        dim=128,
        depth=2,
        num_heads=4,
        cross_attention=partial(pc.CrossAttend, num_heads=16, attention=attention, mlp=mlp),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp, dropout=0.1)),
    )
    return pc.Perceiver(points, encoder, pc.heads.Classification(encoder.dim, num_classes=10))


def as_points(images: Tensor, order: Tensor) -> Tensor:
    """Convert images to points `n 64 3` (row, column, brightness), in the order given by a permutation."""
    axis = pc.positions.coordinates(SIDE)
    position = torch.cartesian_prod(axis, axis).expand(len(images), -1, -1)
    return torch.cat([position, images.flatten(1).unsqueeze(-1)], dim=-1)[:, order]


def augment(points: Tensor) -> Tensor:
    """Distort digits as handwriting varies: random rotation, shear, scale, shift, bending and jitter of each.

    Only coordinates change, not brightness: without resampling nothing is blurred.
    """

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(points), *shape) * 2 - 1) * limit

    position, angle, shear = points[..., :2], uniform(0.25), uniform(0.3)
    rows = [
        torch.stack([angle.cos(), shear - angle.sin()], -1),
        torch.stack([angle.sin() + uniform(0.1), angle.cos()], -1),
    ]
    position = position @ (torch.stack(rows, dim=1) * (1 + uniform(0.2, 1, 2))).mT + uniform(0.2, 1, 2)
    bend = 0.06 * torch.randn(len(points), 1, 2) * (torch.pi * (position.flip(-1) + uniform(1.0, 1, 2))).sin()
    jitter = 0.05 * torch.randn_like(position)
    return torch.cat([position + bend + jitter, points[..., 2:]], dim=-1)


def train(digits: Digits, order: Tensor, *, epochs: int, seed: int, batch: int = 64) -> nn.Module:
    """Train a model on pixels in the given order, and return it with a running average of its weights."""
    torch.manual_seed(seed)
    model, in_order = build(), torch.arange(SIDE * SIDE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    steps = epochs * -(-len(digits.labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.labels)).split(batch):
            points = augment(as_points(digits.images[chosen], in_order))[:, order]
            loss = F.cross_entropy(model(points), digits.labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
    return average.module.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, order: Tensor) -> float:
    """Share of digits that the model recognizes, in percent."""
    predicted = model(as_points(digits.images, order)).argmax(-1)
    return 100 * (predicted == digits.labels).float().mean().item()


def baselines(train_set: Digits, test_set: Digits) -> dict[str, float]:
    """Accuracies of two classifiers that take all pixels as one vector; the order of pixels does not affect them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    models = {"logistic regression": LogisticRegression(max_iter=1000), "support vectors, RBF kernel": SVC(C=10)}
    x, x_test = (digits.images.flatten(1).numpy() / 2 + 0.5 for digits in (train_set, test_set))
    return {name: 100 * model.fit(x, train_set.labels).score(x_test, test_set.labels) for name, model in models.items()}


@torch.no_grad()
def draw(model: nn.Module, digit: Tensor, order: Tensor, path: Path) -> None:
    """Plot a digit, its pixels in input order, and the first attention map of each latent."""
    points = model.adapter(as_points(digit[None], order))
    maps = model.encoder.attention_map(points, read=0)[0].mean(0)  # over the heads; latents x pixels
    maps = maps[:, order.argsort()].unflatten(-1, (SIDE, SIDE))  # every pixel at its position in the image
    shuffled = digit.flatten()[order].unflatten(0, (SIDE, SIDE))
    figure = Figure(figsize=(1.2 * (len(maps) + 2), 1.5), layout="constrained")
    titles = ["digit", "input order", *(f"latent {i + 1}" for i in range(len(maps)))]
    for axes, image, title in zip(figure.subplots(1, len(titles)), [digit[0], shuffled, *maps], titles, strict=True):
        axes.imshow(image.numpy(), cmap="gray" if title in titles[:2] else "magma")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: lambda temporary: figure.savefig(temporary, dpi=150, format="png")})


def table(accuracies: dict[str, float]) -> str:
    """Format accuracies as a Markdown table."""
    rows = [f"| {name:<28} | {value:>7.1f} % |" for name, value in accuracies.items()]
    return "\n".join([f"| {'model':<28} | {'accuracy':>9} |", f"|{'-' * 30}|{'-' * 10}:|", *rows])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train both models, print the table of accuracies and save the figure."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=parse.seed, default=0)
    parser.add_argument("--toy", action="store_true", help="train for two epochs, to check that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of the figure")
    options = parser.parse_args(arguments)
    with output_folder(options.out):
        return run(options)


def run(options: argparse.Namespace) -> dict[str, float]:
    """Train both models with the options of the command line, and return the accuracies of all."""
    train_set, test_set = load()
    in_order = torch.arange(SIDE * SIDE)
    shuffled = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(options.seed))
    accuracies = baselines(train_set, test_set)
    for name, order in {"Perceiver, pixels in order": in_order, "Perceiver, pixels shuffled": shuffled}.items():
        start = time.perf_counter()
        model = train(train_set, order, epochs=2 if options.toy else EPOCHS, seed=options.seed)
        accuracies[name] = accuracy(model, test_set, order)
        print(f"{name}: trained in {time.perf_counter() - start:.0f} s")
    print(table(accuracies))
    draw(model, test_set.images[0], shuffled, options.out / "digits.png")
    print(f"figure: {printable(options.out / 'digits.png')}")
    return accuracies


if __name__ == "__main__":
    sys.exit(run_command(main))
