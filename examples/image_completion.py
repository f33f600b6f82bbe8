"""Image completion: a Perceiver IO reads a few pixels and predicts the color at every coordinate.

The input is a cloud of visible pixels (row, column, color); a query is a coordinate, its output a color. A training
step queries 256 of the 1,024 coordinates. There are two data sets of 32 x 32 pixels, with one model each:

- handwritten digits of scikit-learn, enlarged from 8 x 8, with 4 % of the pixels visible;
- crops of scikit-learn's two photographs, with 10 % visible. Test crops come from strips of the photographs that no
  training crop touches.

    python -m examples.image_completion --out examples/results/image_completion

The baselines are scipy's interpolations, and the mean, given the visible pixels, of a normal distribution that has the
mean and covariance of the training images.

Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2 (queries by position).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import compare, markdown_table

SIDE = 32
STEPS = 4000
NUM_QUERIES = 256  # coordinates that a training step queries
STRIPS = (128, 320, 512)  # first columns of the test strips of a photograph, each 64 columns wide


class ImageSet(NamedTuple):
    """Images `n c 32 32` in [0, 1] for training and for the test.

    Attributes:
        train: Training images.
        test: Test images.
        num_visible: Number of visible pixels of an image.
        min_deviation: Number added to the standard deviation of visible colors before colors are divided by it, since
            photographs have flat parts.
    """

    train: Tensor
    test: Tensor
    num_visible: int
    min_deviation: float


def digits(toy: bool) -> ImageSet:
    """Load scikit-learn's digits, enlarged; the test set is the last 360, by other writers."""
    from sklearn.datasets import load_digits

    small = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, SIDE, mode="bicubic", align_corners=False).clamp(0, 1)
    return ImageSet(large[:1437], large[1437 : 1447 if toy else None], num_visible=41, min_deviation=0.2)


def photographs(toy: bool) -> ImageSet:
    """Crop scikit-learn's photographs: training crops outside the test strips, test crops side by side in them."""
    count = 100 if toy else 8000
    from sklearn.datasets import load_sample_images

    whole = torch.tensor(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 255
    height, width = whole.shape[-2:]
    rng = np.random.default_rng(0)
    corners = zip(
        rng.integers(2, size=count),
        rng.integers(height - SIDE + 1, size=count),
        rng.choice([x for x in range(width - SIDE + 1) if not overlaps_test(x)], size=count),
        strict=True,
    )
    train = torch.stack([whole[i, :, y : y + SIDE, x : x + SIDE] for i, y, x in corners])
    grid = [(i, y, s + x) for i in (0, 1) for y in range(0, height - SIDE + 1, SIDE) for s in STRIPS for x in (0, SIDE)]
    test = torch.stack([whole[i, :, y : y + SIDE, x : x + SIDE] for i, y, x in grid])
    return ImageSet(train, test[::15] if toy else test, num_visible=102, min_deviation=0.02)


def overlaps_test(x: int) -> bool:
    """True if a crop that begins in column x shares a column with a test strip."""
    return any(strip - SIDE < x < strip + 2 * SIDE for strip in STRIPS)


def build(channels: int) -> pc.PerceiverIO:
    """Build the model from visible pixels to the colors at queried coordinates, with 48 latents."""
    positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=SIDE // 2)
    pixels = pc.adapters.PointCloud(num_features=channels, positions=positions)
    mlp, attention = partial(pc.MLP, widening_factor=2), partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128)
    read = partial(pc.CrossAttend, num_heads=8, attention=attention)
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp))
    encoder = pc.Encoder(
        pixels.dim,
        num_latents=48,
        dim=128,
        num_reads=2,
        depth=2,
        num_heads=4,
        cross_attention=read,
        latent_transformer=transformer,
    )
    queries = pc.queries.Grid((SIDE, SIDE), positions)
    output_read = partial(pc.CrossAttend, attention=attention, mlp=partial(pc.MLP, widening_factor=4))
    return pc.PerceiverIO(
        pixels,
        encoder,
        queries,
        pc.Decoder(encoder.dim, query_dim=queries.dim, out_dim=channels, num_heads=8, cross_attention=output_read),
    )


def visible_points(images: Tensor, index: Tensor, min_deviation: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the visible pixels, with normalized colors.

    Args:
        images: Images `b c 32 32`.
        index: Indices of the visible pixels, `b n`.
        min_deviation: Number added to the standard deviation of the visible colors.

    Returns:
        Points `b n 2+c` (row, column, normalized color), and the mean and deviation of the visible colors, which
        broadcast to `b 1 c`.
    """
    colors = images.flatten(2).mT.gather(1, index[..., None].expand(-1, -1, images.shape[1]))
    mean, deviation = colors.mean(1, keepdim=True), colors.std((1, 2), keepdim=True) + min_deviation
    axis = pc.positions.coordinates(SIDE)
    return torch.cat([torch.cartesian_prod(axis, axis)[index], (colors - mean) / deviation], dim=-1), mean, deviation


def random_pixels(num_images: int, num_pixels: int, size: int) -> Tensor:
    """Draw `num_pixels` different indices below `size` for each image, `num_images num_pixels`."""
    return torch.rand(num_images, size).argsort(1)[:, :num_pixels]


def augment(images: Tensor) -> Tensor:
    """Augment a batch, all images alike: photographs are flipped and rotated, digits shifted by up to two pixels."""
    if images.shape[1] == 1:
        return images.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    flipped = images.flip(3) if torch.rand(()) < 0.5 else images
    return flipped.rot90(int(torch.randint(4, ())), (2, 3))


def loss(model: nn.Module, data: ImageSet, batch: int = 32) -> Tensor:
    """Squared error at randomly queried pixels, in units of each image's deviation."""
    images = augment(data.train[torch.randint(len(data.train), (batch,))])
    points, mean, deviation = visible_points(
        images, random_pixels(batch, data.num_visible, SIDE**2), data.min_deviation
    )
    queried = random_pixels(batch, NUM_QUERIES, SIDE**2)
    target = images.flatten(2).mT.gather(1, queried[..., None].expand(-1, -1, images.shape[1]))
    return F.mse_loss(model(points, query_inputs=queried), (target - mean) / deviation)


@torch.no_grad()
def complete(model: nn.Module, images: Tensor, index: Tensor, min_deviation: float) -> Tensor:
    """Predict whole images with the model, keeping the visible pixels."""
    points, mean, deviation = visible_points(images, index, min_deviation)
    colors = torch.cat([model(batch) for batch in points.split(60)])
    return keep_visible((colors * deviation + mean).mT.unflatten(-1, (SIDE, SIDE)), images, index)


def keep_visible(completed: Tensor, images: Tensor, index: Tensor) -> Tensor:
    """Clip completed images to [0, 1], and restore their visible pixels."""
    index = index[:, None].expand(-1, images.shape[1], -1)
    visible = images.flatten(2).gather(2, index)
    return completed.clamp(0, 1).flatten(2).scatter(2, index, visible).unflatten(2, (SIDE, SIDE))


def interpolate(images: Tensor, index: Tensor, method: str) -> Tensor:
    """Complete images by scipy's interpolation.

    Pixels outside the convex hull of the visible ones get the color of the nearest of them.

    Args:
        images: Images `n c 32 32`.
        index: Indices of the visible pixels, `n num_visible`.
        method: `nearest`, `linear`, `cubic` or `spline` (thin-plate spline).
    """
    from scipy.interpolate import RBFInterpolator, griddata

    grid = np.stack(np.mgrid[:SIDE, :SIDE], -1).reshape(-1, 2)

    def complete_one(image: Tensor, visible: Tensor) -> Tensor:
        points, colors = grid[visible], image.flatten(1).T[visible].double().numpy()
        if method == "spline":
            result = RBFInterpolator(points, colors, kernel="thin_plate_spline")(grid)
        else:
            nearest = griddata(points, colors, grid, method="nearest")
            result = griddata(points, colors, grid, method=method)
            result = np.where(np.isnan(result), nearest, result)
        return torch.tensor(result.T.reshape(image.shape), dtype=torch.float32)

    completed = torch.stack([complete_one(*pair) for pair in zip(images, index, strict=True)])
    return keep_visible(completed, images, index)


def gaussian(data: ImageSet, images: Tensor, index: Tensor, *, noise: float = 1e-4) -> Tensor:
    """Complete images by the conditional mean of a normal distribution, given the visible pixels.

    Args:
        data: Images whose training part gives mean and covariance.
        images: Images to complete, `n c 32 32`.
        index: Indices of the visible pixels, `n num_visible`.
        noise: Variance added to each pixel.
    """
    x = torch.cat([augment(part) for part in data.train.split(50) for _ in range(2)]).flatten(1).double()
    mean, covariance = x.mean(0), x.T.cov() + noise * torch.eye(x.shape[1])
    completed = []
    for image, visible in zip(images, index, strict=True):
        i = (torch.arange(images.shape[1])[:, None] * SIDE**2 + visible).flatten()
        weights = torch.linalg.solve(covariance[i][:, i], image.flatten().double()[i] - mean[i])
        completed.append((mean + covariance[:, i] @ weights).reshape(image.shape))
    return keep_visible(torch.stack(completed).float(), images, index)


def complete_test_set(model: nn.Module, data: ImageSet) -> dict[str, Tensor]:
    """Complete the test images with every method.

    Returns:
        Images by name: the `visible` pixels on gray, the result of each method, and the `truth`.
    """
    images, index = data.test, random_pixels(len(data.test), data.num_visible, SIDE**2)
    completed = {name: interpolate(images, index, name) for name in ("nearest", "linear", "cubic", "spline")}
    completed["normal distribution"] = gaussian(data, images, index)
    completed["Perceiver IO"] = complete(model, images, index, data.min_deviation)
    return {"visible": keep_visible(torch.ones_like(images) / 2, images, index), **completed, "truth": images}


def psnr(completed: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB."""
    return -10 * (completed - images).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def draw(completed: dict[str, dict[str, Tensor]], num_images: int = 5) -> Figure:
    """Plot some test images of each data set with every method, from the half with more contrast."""
    columns = list(next(iter(completed.values())))
    rows = []
    for images in completed.values():
        order = images["truth"].flatten(1).std(1).argsort(descending=True)
        selected = order[torch.arange(num_images) * len(order) // (2 * num_images)]
        rows += [{name: x[i] for name, x in images.items()} for i in selected]
    figure = Figure(figsize=(1.35 * len(columns), 1.35 * len(rows) + 0.3), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), len(columns)), rows, strict=True):
        for axes, name in zip(line, columns, strict=True):
            axes.imshow(row[name].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
            if row is rows[0]:
                axes.set_title(name, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train on each data set, compare the methods, and write result and figure."""
    run = Run("image_completion", __doc__, arguments)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    completed: dict[str, dict[str, Tensor]] = {}
    for name, load in {"digits": digits, "photographs": photographs}.items():
        data, steps = load(run.toy), 3 if run.toy else STEPS
        model = run.train(name, build(data.train.shape[1]), partial(loss, data=data), steps=steps, lr=2e-3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the selection of visible test pixels does not depend on the seed of the run
            completed[name] = complete_test_set(model, data)
        truth = completed[name]["truth"]
        scores = {method: psnr(x, truth) for method, x in completed[name].items() if method not in ("visible", "truth")}
        tables[name] = compare(scores, ours="Perceiver IO")
        print(f"{name}\n{markdown_table(tables[name], 'dB')}")
        sizes[name] = {"train": len(data.train), "test": len(truth), "visible": data.num_visible, "pixels": SIDE**2}
    return run.finish(draw(completed), tables=tables, data=sizes)


if __name__ == "__main__":
    sys.exit(run_command(main))
