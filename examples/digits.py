"""Handwritten digits as a cloud of pixels: a Perceiver does not know that a picture is a picture.

Each of the 8 x 8 pixels is a point (row, column, brightness). The same model is trained twice: with the pixels in
order, and with all pixels shuffled by one fixed permutation. A convolution would be lost; here the position of a pixel
travels with it, so nothing changes but the order in which tokens are added up.

    python -m examples.digits

Over seeds and orders the Perceiver finds 94.4 to 96.9 % of the 360 test digits, about 96 % in the mean; logistic
regression finds 90.0 %. One digit is 0.3 %, and both orders are the same training up to rounding.

Reference: Jaegle et al. 2021 (Perceiver), section 4.1 and table 2, does this to ImageNet.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import perceiver_core as pc

TRAINED_ON = 1437  # of 1,797 pictures; the last 360, by other writers, are the test
SIDE = 8
EPOCHS = 40


class Digits(NamedTuple):
    """Pictures `n 1 8 8` in [-1, 1] and what they show."""

    pictures: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Scikit-learn's digits, which come with the package: the first to train, the last to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    whole = Digits(torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target))
    return Digits(*(x[:TRAINED_ON] for x in whole)), Digits(*(x[TRAINED_ON:] for x in whole))


def build() -> pc.Perceiver:
    """The model: 64 points to 16 latents, to ten logits."""
    points = pc.adapters.PointCloud(num_features=1, positions=pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=4))
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


def as_points(pictures: Tensor, order: Tensor) -> Tensor:
    """Pixels `n 64 3` in a given order: row, column, brightness."""
    axis = pc.positions.coordinates(SIDE)
    where = torch.cartesian_prod(axis, axis).expand(len(pictures), -1, -1)
    return torch.cat([where, pictures.flatten(1).unsqueeze(-1)], dim=-1)[:, order]


def wobble(points: Tensor) -> Tensor:
    """Pictures turned, sheared, scaled, moved, bent and shaken a little, each in its own way, as handwriting is.

    The coordinates move and the brightness stays: nothing is resampled, so nothing is blurred.
    """

    def within(most: float, *shape: int) -> Tensor:
        return (torch.rand(len(points), *shape) * 2 - 1) * most

    where, turn, lean = points[..., :2], within(0.25), within(0.3)
    rows = [torch.stack([turn.cos(), lean - turn.sin()], -1), torch.stack([turn.sin() + within(0.1), turn.cos()], -1)]
    where = where @ (torch.stack(rows, dim=1) * (1 + within(0.2, 1, 2))).mT + within(0.2, 1, 2)
    bend = 0.06 * torch.randn(len(points), 1, 2) * (torch.pi * (where.flip(-1) + within(1.0, 1, 2))).sin()
    jitter = 0.05 * torch.randn_like(where)
    return torch.cat([where + bend + jitter, points[..., 2:]], dim=-1)


def train(digits: Digits, order: Tensor, *, epochs: int, seed: int, batch: int = 64) -> nn.Module:
    """A model that has read pixels in this order; its weights are a running average of those in training."""
    torch.manual_seed(seed)
    model, in_order = build(), torch.arange(SIDE * SIDE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    steps = epochs * -(-len(digits.labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.labels)).split(batch):
            points = wobble(as_points(digits.pictures[chosen], in_order))[:, order]
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
    """The share of digits that are recognized, in percent."""
    found = model(as_points(digits.pictures, order)).argmax(-1)
    return 100 * (found == digits.labels).float().mean().item()


def baselines(seen: Digits, unseen: Digits) -> dict[str, float]:
    """What models that take all pixels as one vector reach; no order means anything to them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    models = {"logistic regression": LogisticRegression(max_iter=1000), "support vectors, RBF kernel": SVC(C=10)}
    x, test = (digits.pictures.flatten(1).numpy() / 2 + 0.5 for digits in (seen, unseen))
    return {name: 100 * model.fit(x, seen.labels).score(test, unseen.labels) for name, model in models.items()}


@torch.no_grad()
def draw(model: nn.Module, digit: Tensor, order: Tensor, path: Path) -> None:
    """A digit, the order in which a model got its pixels, and where its latents look first."""
    from matplotlib.figure import Figure

    points = model.adapter(as_points(digit[None], order))
    looked = model.encoder.attention_map(points, read=0)[0].mean(0)  # over the heads; latents x pixels
    looked = looked[:, order.argsort()].unflatten(-1, (SIDE, SIDE))  # every pixel back in its place
    shuffled = digit.flatten()[order].unflatten(0, (SIDE, SIDE))
    figure = Figure(figsize=(1.2 * (len(looked) + 2), 1.5), layout="constrained")
    titles = ["digit", "as given", *(f"latent {i + 1}" for i in range(len(looked)))]
    for axes, picture, title in zip(
        figure.subplots(1, len(titles)), [digit[0], shuffled, *looked], titles, strict=True
    ):
        axes.imshow(picture.numpy(), cmap="gray" if title in titles[:2] else "magma")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table(accuracies: dict[str, float]) -> str:
    """Accuracies as a Markdown table."""
    rows = [f"| {name:<28} | {value:>7.1f} % |" for name, value in accuracies.items()]
    return "\n".join([f"| {'model':<28} | {'accuracy':>9} |", f"|{'-' * 30}|{'-' * 10}:|", *rows])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains both models, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="where the picture goes")
    options = parser.parse_args(arguments)

    seen, unseen = load()
    in_order = torch.arange(SIDE * SIDE)
    shuffled = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(options.seed))
    found = baselines(seen, unseen)
    for name, order in {"Perceiver, pixels in order": in_order, "Perceiver, pixels shuffled": shuffled}.items():
        start = time.perf_counter()
        model = train(seen, order, epochs=1 if options.toy else EPOCHS, seed=options.seed)
        found[name] = accuracy(model, unseen, order)
        print(f"{name}: trained in {time.perf_counter() - start:.0f} s")
    print(table(found))
    draw(model, unseen.pictures[0], shuffled, options.out / "digits.png")
    print(f"picture: {options.out / 'digits.png'}")
    return found


if __name__ == "__main__":
    main()
