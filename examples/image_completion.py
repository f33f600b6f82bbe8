"""A whole picture from a few of its pixels, by asking a Perceiver IO for the color at each coordinate.

The input is a cloud of visible pixels (row, column, color), the question is a place, the answer is a color. Training
asks for 256 of the 1,024 places at a time. Two kinds of pictures of 32 x 32 pixels, one model each:

- handwritten digits of scikit-learn, enlarged from 8 x 8, of which 4 % of the pixels are visible;
- crops of scikit-learn's two photographs, of which 10 % are visible. Test crops come from strips of the photographs
  that no training crop touches.

    python -m examples.image_completion --out examples/results/image_completion

The baselines are scipy's interpolations, and the mean, given the visible pixels, of a normal distribution that has the
mean and covariance of the training pictures.

Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2 (queries by position).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples import _run

SIDE = 32
STEPS = 4000
ASKED = 256  # places that a step of training asks for
STRIPS = (128, 320, 512)  # where the test strips of a photograph begin, each 64 columns wide


class Pictures(NamedTuple):
    """Pictures `n c 32 32` in [0, 1] to train and to test on.

    Their colors are divided by the deviation of the visible ones and `least`, since photographs have flat parts.
    """

    seen: Tensor
    unseen: Tensor
    visible: int
    least: float


def digits(toy: bool) -> Pictures:
    """The test is the last 360, by other writers."""
    from sklearn.datasets import load_digits

    small = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, SIDE, mode="bicubic", align_corners=False).clamp(0, 1)
    return Pictures(large[:1437], large[1437 : 1447 if toy else None], visible=41, least=0.2)


def photographs(toy: bool) -> Pictures:
    """Training crops lie anywhere between the test strips, test crops side by side in these."""
    count = 100 if toy else 8000
    from sklearn.datasets import load_sample_images

    whole = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 255
    high, wide = whole.shape[-2:]
    rng = np.random.default_rng(0)
    places = zip(
        rng.integers(2, size=count),
        rng.integers(high - SIDE + 1, size=count),
        rng.choice([x for x in range(wide - SIDE + 1) if not in_test(x)], size=count),
        strict=True,
    )
    seen = torch.stack([whole[i, :, y : y + SIDE, x : x + SIDE] for i, y, x in places])
    grid = [(i, y, s + x) for i in (0, 1) for y in range(0, high - SIDE + 1, SIDE) for s in STRIPS for x in (0, SIDE)]
    unseen = torch.stack([whole[i, :, y : y + SIDE, x : x + SIDE] for i, y, x in grid])
    return Pictures(seen, unseen[::15] if toy else unseen, visible=102, least=0.02)


def in_test(x: int) -> bool:
    """Whether a crop that begins in column x shares a column with a test strip."""
    return any(strip - SIDE < x < strip + 2 * SIDE for strip in STRIPS)


def build(channels: int) -> pc.PerceiverIO:
    """The model: visible pixels to 48 latents; a place, to its color."""
    where = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=SIDE // 2)
    pixels = pc.adapters.PointCloud(num_features=channels, positions=where)
    mlp, attention = partial(pc.MLP, widening_factor=2), partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128)
    read = partial(pc.CrossAttend, num_heads=8, attention=attention)
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp))
    encoder = pc.Encoder(pixels.dim, num_latents=48, dim=128, num_reads=2, depth=2, num_heads=4, cross_attention=read, latent_transformer=process)
    ask = pc.queries.Grid((SIDE, SIDE), where)
    answer = partial(pc.CrossAttend, attention=attention, mlp=partial(pc.MLP, widening_factor=4))
    return pc.PerceiverIO(
        pixels, encoder, ask, pc.Decoder(encoder.dim, query_dim=ask.dim, out_dim=channels, num_heads=8, cross_attention=answer)
    )


def look(pictures: Tensor, at: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is visible `b n 2+c`: coordinates, and colors less their mean over their deviation; these two `b 1 c`."""
    colors = pictures.flatten(2).mT.gather(1, at[..., None].expand(-1, -1, pictures.shape[1]))
    mean, deviation = colors.mean(1, keepdim=True), colors.std((1, 2), keepdim=True) + least
    axis = pc.positions.coordinates(SIDE)
    return torch.cat([torch.cartesian_prod(axis, axis)[at], (colors - mean) / deviation], dim=-1), mean, deviation


def some(count: int, among: int, of: int) -> Tensor:
    """For each of `count` pictures, `among` of its `of` places, none twice."""
    return torch.rand(count, of).argsort(1)[:, :among]


def varied(pictures: Tensor) -> Tensor:
    """Photographs mirrored and turned, digits moved by up to two pixels, all in the same way."""
    if pictures.shape[1] == 1:
        return pictures.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    flipped = pictures.flip(3) if torch.rand(()) < 0.5 else pictures
    return flipped.rot90(int(torch.randint(4, ())), (2, 3))


def loss(model: nn.Module, data: Pictures, batch: int = 32) -> Tensor:
    """The squared error at some places, in units of each picture's deviation."""
    pictures = varied(data.seen[torch.randint(len(data.seen), (batch,))])
    points, mean, deviation = look(pictures, some(batch, data.visible, SIDE**2), data.least)
    asked = some(batch, ASKED, SIDE**2)
    wanted = pictures.flatten(2).mT.gather(1, asked[..., None].expand(-1, -1, pictures.shape[1]))
    return F.mse_loss(model(points, query_inputs=asked), (wanted - mean) / deviation)


@torch.no_grad()
def complete(model: nn.Module, pictures: Tensor, at: Tensor, least: float) -> Tensor:
    """The pictures as the model sees them; the visible pixels are kept."""
    points, mean, deviation = look(pictures, at, least)
    found = torch.cat([model(some_points) for some_points in points.split(60)])
    return kept((found * deviation + mean).mT.unflatten(-1, (SIDE, SIDE)), pictures, at)


def kept(found: Tensor, pictures: Tensor, at: Tensor) -> Tensor:
    """What was found, in [0, 1], with the visible pixels as they are."""
    index = at[:, None].expand(-1, pictures.shape[1], -1)
    given = pictures.flatten(2).gather(2, index)
    return found.clamp(0, 1).flatten(2).scatter(2, index, given).unflatten(2, (SIDE, SIDE))


def interpolate(pictures: Tensor, at: Tensor, method: str) -> Tensor:
    """Scipy's interpolation; outside the hull of the visible pixels, the nearest of them."""
    from scipy.interpolate import RBFInterpolator, griddata

    everywhere = np.stack(np.mgrid[:SIDE, :SIDE], -1).reshape(-1, 2)

    def one(picture: Tensor, chosen: Tensor) -> Tensor:
        where, colors = everywhere[chosen], picture.flatten(1).T[chosen].double().numpy()
        if method == "spline":
            found = RBFInterpolator(where, colors, kernel="thin_plate_spline")(everywhere)
        else:
            nearest = griddata(where, colors, everywhere, method="nearest")
            found = griddata(where, colors, everywhere, method=method)
            found = np.where(np.isnan(found), nearest, found)
        return torch.tensor(found.T.reshape(picture.shape), dtype=torch.float32)

    return kept(torch.stack([one(*pair) for pair in zip(pictures, at, strict=True)]), pictures, at)


def gaussian(data: Pictures, pictures: Tensor, at: Tensor, *, noise: float = 1e-4) -> Tensor:
    """The mean of a normal distribution with the moments of the training pictures, given the visible pixels."""
    x = torch.cat([varied(part) for part in data.seen.split(50) for _ in range(2)]).flatten(1).double()
    mean, covariance = x.mean(0), x.T.cov() + noise * torch.eye(x.shape[1])
    found = []
    for picture, chosen in zip(pictures, at, strict=True):
        i = (torch.arange(pictures.shape[1])[:, None] * SIDE**2 + chosen).flatten()
        weights = torch.linalg.solve(covariance[i][:, i], picture.flatten().double()[i] - mean[i])
        found.append((mean + covariance[:, i] @ weights).reshape(picture.shape))
    return kept(torch.stack(found).float(), pictures, at)


def tested(model: nn.Module, data: Pictures) -> dict[str, Tensor]:
    """The test pictures: what is visible, what each method makes of it, what is there."""
    pictures, at = data.unseen, some(len(data.unseen), data.visible, SIDE**2)
    found = {name: interpolate(pictures, at, name) for name in ("nearest", "linear", "cubic", "spline")}
    found["normal distribution"] = gaussian(data, pictures, at)
    found["Perceiver IO"] = complete(model, pictures, at, data.least)
    return {"visible": kept(torch.ones_like(pictures) / 2, pictures, at), **found, "truth": pictures}


def psnr(found: Tensor, pictures: Tensor) -> Tensor:
    """The ratio of peak to noise of each picture, in dB."""
    return -10 * (found - pictures).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def draw(shown: dict[str, dict[str, Tensor]], several: int = 5) -> Any:
    """Some test pictures of each kind, of the half with more contrast: what is visible, was made of it, was there."""
    from matplotlib.figure import Figure

    columns = list(next(iter(shown.values())))
    rows = []
    for kind in shown.values():
        order = kind["truth"].flatten(1).std(1).argsort(descending=True)
        picked = order[torch.arange(several) * len(order) // (2 * several)]
        rows += [{name: x[i] for name, x in kind.items()} for i in picked]
    figure = Figure(figsize=(1.35 * len(columns), 1.35 * len(rows) + 0.3), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), len(columns)), rows, strict=True):
        for axes, name in zip(line, columns, strict=True):
            axes.imshow(row[name].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
            if row is rows[0]:
                axes.set_title(name, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains on each kind of pictures, compares, draws, and writes the result."""
    run = _run.Run("image_completion", __doc__, arguments)
    rows: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    shown: dict[str, dict[str, Tensor]] = {}
    for kind, load in {"digits": digits, "photographs": photographs}.items():
        data, steps = load(run.toy), 3 if run.toy else STEPS
        model = run.train(kind, build(data.seen.shape[1]), partial(loss, data=data), steps=steps, lr=2e-3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what is visible in the test does not depend on the seed of the run
            shown[kind] = tested(model, data)
        truth = shown[kind]["truth"]
        scores = {name: psnr(x, truth) for name, x in shown[kind].items() if name not in ("visible", "truth")}
        rows[kind] = _run.compare(scores, ours="Perceiver IO")
        print(f"{kind}\n{_run.table(rows[kind], 'dB')}")
        sizes[kind] = {"train": len(data.seen), "test": len(truth), "visible": data.visible, "pixels": SIDE**2}
    return run.finish(draw(shown), tables=rows, data=sizes)


if __name__ == "__main__":
    main()
