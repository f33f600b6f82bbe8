"""Optical flow, the motion of every pixel between two frames, learned from generated pairs and tested on photographs.

A texture is moved by a smooth flow of at most four pixels: frame 1 is the texture at x + flow(x), frame 2 the texture
at x. Frame 2 has another gain and gamma, and both frames have noise. Training uses generated textures (smooth noise,
stripes, discs), each pair once. The test uses further textures, and scikit-learn's two photographs.

    python -m examples.optical_flow --out examples/results/optical_flow

A token is a pixel with its neighborhood in both frames, and each token is also a query. Unlike in the paper,
neighborhoods are 7 x 7, and the decoder has a residual connection from its queries. A training step queries 192 of the
768 pixels; the test queries all, in chunks. The baselines are scikit-image's TV-L1 and iterative Lucas-Kanade, with the
settings that perform best on training pairs. Errors are means over the pixels that are visible in both frames.

Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 (optical flow).
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
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import compare, markdown_table

HEIGHT, WIDTH = 24, 32  # pixels of a frame
MOTION_RANGE = (1.0, 4.0)  # motion of the fastest pixel of a pair, in pixels
MARGIN = 5  # texture around a frame, in pixels of the frame
TEXTURE_SCALE = 2  # pixels of a texture per pixel of a frame, along each axis
TEXTURE_SIZE = (TEXTURE_SCALE * (HEIGHT + 2 * MARGIN), TEXTURE_SCALE * (WIDTH + 2 * MARGIN))
PATCH = 7
STEPS = 2200
BATCH = 16
NUM_QUERIES = 192  # pixels that a training step queries
TRAIN, TEST = 0, 1  # seeds of the pairs
Setting = dict[str, int | bool]
ZOOMS = (1, 2, 3)  # factors by which frames are enlarged for the baselines
SETTINGS: dict[str, list[Setting]] = {
    "tvl1": [{"zoom": zoom, "attachment": a, "num_warp": 10} for zoom in ZOOMS for a in (2, 5, 10)],
    "ilk": [{"zoom": zoom, "radius": zoom * r, "gaussian": True} for zoom in ZOOMS for r in (3, 5, 7)],
}


class Pairs(NamedTuple):
    """Frames `n 2 1 h w`, each with mean 0 and deviation about 1; flow `n 2 h w` in pixels, rows before columns."""

    frames: Tensor
    flow: Tensor


def random_textures(count: int, rng: Generator) -> Tensor:
    """Draw textures `n 1 h w` in [0, 1]: mixtures of noise at several scales, stripes and discs."""
    height, width = TEXTURE_SIZE
    axes = torch.arange(height) / TEXTURE_SCALE, torch.arange(width) / TEXTURE_SCALE
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    layers = []
    for scale in (3, 6, 12):  # distance between the values of the noise, in pixels of a frame
        size = (height // (TEXTURE_SCALE * scale) + 2, width // (TEXTURE_SCALE * scale) + 2)
        coarse = torch.randn(count, 1, *size, generator=rng)
        layers.append(F.interpolate(coarse, TEXTURE_SIZE, mode="bicubic", align_corners=True))
    angle, phase = 2 * torch.pi * torch.rand(2, count, 1, 1, 1, generator=rng)
    length = 4 * 4 ** torch.rand(count, 1, 1, 1, generator=rng)  # 4 to 16 pixels a stripe
    layers.append(torch.sin(2 * torch.pi * (angle.cos() * rows + angle.sin() * columns) / length + phase))
    discs = torch.zeros(count, 1, height, width)
    for _ in range(12):
        y, x, radius, shade = torch.rand(4, count, 1, 1, 1, generator=rng)
        down, right = rows - y * height / TEXTURE_SCALE, columns - x * width / TEXTURE_SCALE
        cover = torch.sigmoid(2 * (2 + 5 * radius - (down.square() + right.square()).sqrt()))
        discs = discs.lerp(shade.expand_as(discs), cover)  # covers earlier discs
    layers.append(discs)
    mixed = torch.stack([_layer_weight(count, rng) * normalize(layer) for layer in layers]).sum(0)
    contrast = 0.3 + 1.7 * torch.rand(count, 1, 1, 1, generator=rng)
    return torch.sigmoid(contrast * normalize(mixed))


def _layer_weight(count: int, rng: Generator) -> Tensor:
    """Random weight of a layer in each texture; squaring makes most weights small."""
    return torch.rand(count, 1, 1, 1, generator=rng) ** 2


def photographs() -> Tensor:
    """Crops `n 1 h w` of scikit-learn's two photographs, side by side, in gray, without crops of low contrast."""
    from sklearn.datasets import load_sample_images

    gray = torch.tensor(np.stack(load_sample_images().images)).float().mean(-1, keepdim=True).permute(0, 3, 1, 2) / 255
    # Smoothing removes detail that a frame cannot show.
    smooth = F.avg_pool2d(F.pad(gray, (1, 0, 1, 0), mode="replicate"), TEXTURE_SCALE, stride=1)
    crops = smooth.unfold(2, TEXTURE_SIZE[0], TEXTURE_SIZE[0]).unfold(3, TEXTURE_SIZE[1], TEXTURE_SIZE[1])
    crops = crops.reshape(-1, 1, *TEXTURE_SIZE)
    return crops[crops.std((1, 2, 3)) > 0.05]  # leaves out the sky


def random_flows(count: int, rng: Generator) -> Tensor:
    """Draw smooth flows `n 2 h w`: the sum of a translation, a linear map and a smooth random field."""
    positions = torch.stack([torch.ones(HEIGHT, WIDTH), *_grid(HEIGHT, WIDTH)])
    affine = torch.randn(count, 2, 3, generator=rng) * torch.tensor([1.0, 0.5, 0.5])
    coarse = torch.randn(count, 2, 4, 5, generator=rng)
    bends = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic", align_corners=True)
    flow = torch.einsum("ncp,phw->nchw", affine, positions) + 0.5 * bends
    low, high = MOTION_RANGE
    speed = low + (high - low) * torch.rand(count, 1, 1, 1, generator=rng)
    return flow * speed / flow.norm(dim=1, keepdim=True).amax((2, 3), keepdim=True)


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column coordinates from -1 to 1."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return rows, columns


def warp(textures: Tensor, flow: Tensor) -> Tensor:
    """Render two frames `n 2 1 h w` of each texture: the texture displaced by the flow, and the texture itself."""
    pixels = torch.stack(torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")).float()
    positions = torch.stack([pixels + flow, pixels.expand_as(flow)], dim=1) + MARGIN  # n 2 2 h w
    size = torch.tensor(TEXTURE_SIZE)[:, None, None] - 1
    # As `grid_sample` expects: columns first, from -1 to 1.
    sample_points = (2 * TEXTURE_SCALE * positions / size - 1).flip(2).flatten(0, 1).movedim(1, -1)
    frames = F.grid_sample(textures.repeat_interleave(2, 0), sample_points, mode="bicubic", align_corners=True)
    return frames.clamp(0, 1).unflatten(0, (-1, 2))


def perturb(frames: Tensor, rng: Generator) -> Tensor:
    """Apply a random gain and gamma to the second frame, and add noise to both."""
    gain, gamma = 1.3 ** (2 * torch.rand(2, len(frames), 1, 1, 1, generator=rng) - 1)
    second = gain * frames[:, 1] ** gamma
    noise = 0.04 * torch.rand(len(frames), 1, 1, 1, 1, generator=rng)
    return torch.stack([frames[:, 0], second], dim=1) + noise * torch.randn(frames.shape, generator=rng)


def normalize(images: Tensor) -> Tensor:
    """Subtract the mean of each image and divide by its deviation plus 0.02, which keeps flat images finite."""
    deviation = images.std((-2, -1), keepdim=True) + 0.02
    return (images - images.mean((-2, -1), keepdim=True)) / deviation


def make_pairs(textures: Tensor, rng: Generator) -> Pairs:
    """Make a pair of frames with a random flow from each texture."""
    flow = random_flows(len(textures), rng)
    return Pairs(normalize(perturb(warp(textures, flow), rng)), flow)


def visible_in_both(flow: Tensor) -> Tensor:
    """Mask `n h w` of the pixels of frame 1 that are still inside frame 2."""
    rows, columns = torch.arange(HEIGHT)[:, None] + flow[:, 0], torch.arange(WIDTH) + flow[:, 1]
    return (rows >= 0) & (rows <= HEIGHT - 1) & (columns >= 0) & (columns <= WIDTH - 1)


def build() -> pc.PerceiverIO:
    """Build the model from frame pairs to flow, with 32 latents; the input tokens are also the queries."""
    positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=(HEIGHT, WIDTH))
    pair = pc.adapters.FramePair(positions=positions, num_channels=1, patch_size=PATCH, dim=128 - positions.dim)
    attention = partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128)
    read = partial(pc.CrossAttend, num_heads=8, attention=attention, mlp=partial(pc.MLP, widening_factor=2))
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(
        pair.dim, num_latents=32, dim=128, depth=2, num_heads=4, cross_attention=read, latent_transformer=transformer
    )
    queries = pc.queries.FromInputs(pair.dim)
    output_read = partial(pc.CrossAttend, residual=True, attention=attention, mlp=partial(pc.MLP, widening_factor=4))
    decoder = pc.Decoder(
        encoder.dim, query_dim=queries.dim, out_dim=2, num_heads=8, cross_attention=output_read, chunk_size=256
    )
    return pc.PerceiverIO(pair, encoder, queries, decoder, pc.heads.Grid((HEIGHT, WIDTH), scale=0.25))


def loss(model: nn.Module, rng: Generator) -> Tensor:
    """Mean end-point error at random pixels of newly generated pairs."""
    frames, flow = make_pairs(random_textures(BATCH, rng), rng)
    index = torch.rand(BATCH, HEIGHT * WIDTH).argsort(1)[:, :NUM_QUERIES]
    target = flow.flatten(2).mT.gather(1, index[..., None].expand(-1, -1, 2))
    return pc.losses.end_point_error(model(frames, query_inputs=index), target)


@torch.no_grad()
def predict(model: nn.Module, frames: Tensor) -> Tensor:
    """Flow that the model predicts for each pair, at all pixels."""
    return torch.cat([model(batch) for batch in frames.split(50)])


def classical_flow(frames: Tensor, method: str, *, zoom: int, **settings: int) -> Tensor:
    """Estimate the flow of each pair by a method of scikit-image.

    Args:
        frames: Frames `n 2 1 h w`.
        method: `tvl1` or `ilk`.
        zoom: Factor by which frames are enlarged first, since small frames allow no image pyramid.
        **settings: Arguments of the method.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage import registration
    except ImportError as error:
        raise ImportError("the baselines need scikit-image: pip install scikit-image") from error
    solve = partial(getattr(registration, f"optical_flow_{method}"), **settings)
    size = (HEIGHT * zoom, WIDTH * zoom)
    large = F.interpolate(frames.flatten(0, 1), size, mode="bicubic", align_corners=False).unflatten(0, (-1, 2))
    flow = torch.tensor(np.stack([solve(first, second) for first, second in large.squeeze(2).numpy()]))
    return F.avg_pool2d(flow, zoom) / zoom


def tune(method: str, settings: Sequence[Setting], train: Pairs) -> Setting:
    """Select the settings with the least mean error on the given pairs."""
    return min(
        settings,
        key=lambda chosen: mean_errors(classical_flow(train.frames, method, **chosen), train.flow).mean().item(),
    )


def mean_errors(predicted: Tensor, flow: Tensor) -> Tensor:
    """Mean end-point error of each pair in pixels, over the pixels that are visible in both frames."""
    samples = zip(predicted, flow, visible_in_both(flow), strict=True)
    return torch.stack([pc.losses.end_point_error(a[None], b[None], visible[None]) for a, b, visible in samples])


def flow_colors(flow: Tensor) -> np.ndarray:
    """Color image of a flow `2 h w`: the hue shows the direction, the saturation the speed."""
    from matplotlib.colors import hsv_to_rgb

    hue = torch.atan2(flow[0], flow[1]) / (2 * torch.pi) % 1
    strength = (flow.norm(dim=0) / MOTION_RANGE[1]).clamp(max=1)
    return np.asarray(hsv_to_rgb(torch.stack([hue, strength, torch.ones_like(hue)], -1).numpy()))


def draw(tests: dict[str, Pairs], predicted: dict[str, dict[str, Tensor]], num_pairs: int = 3) -> Figure:
    """Plot some pairs of each test set: the frames, the true flow, and the flow by each method with its error."""
    names = [name for name in next(iter(predicted.values())) if name != "zero flow"]
    rows = [(test_name, i * len(test.flow) // num_pairs) for test_name, test in tests.items() for i in range(num_pairs)]
    figure = Figure(figsize=(1.75 * (3 + len(names)) + 1.4, 1.3 * len(rows) + 0.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.75 * (3 + len(names)), 1.4))
    for line, (test_name, i) in zip(left.subplots(len(rows), 3 + len(names)), rows, strict=True):
        first, second = tests[test_name].frames[i, :, 0].numpy()
        shown = {"frame 1": first, "frame 2": second, "true flow": flow_colors(tests[test_name].flow[i])}
        shown |= {name: flow_colors(predicted[test_name][name][i]) for name in names}
        for axes, (name, image) in zip(line, shown.items(), strict=True):
            axes.imshow(image, cmap="gray")
            axes.set(xticks=[], yticks=[])
            if (test_name, i) == rows[0]:
                axes.set_title(name, fontsize=10)
            if name in names:
                error = mean_errors(predicted[test_name][name][i, None], tests[test_name].flow[i, None]).item()
                axes.text(1, 3, f"{error:.2f}", fontsize=8, bbox={"color": "white", "alpha": 0.6, "pad": 1})
        line[0].set_ylabel(test_name.split()[0], fontsize=10)
    wheel = right.subplots()
    disc = MOTION_RANGE[1] * torch.stack(_grid(101, 101))
    inside = disc.norm(dim=0) <= MOTION_RANGE[1]
    wheel.imshow(np.where(inside[..., None], flow_colors(disc), 1))
    wheel.axis("off")
    wheel.set_title(f"radius {MOTION_RANGE[1]:.0f} pixels", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train the model, tune the baselines, compare them, and write result and figure."""
    run = Run("optical_flow", __doc__, arguments)
    rng = Generator().manual_seed(TRAIN)
    train = make_pairs(random_textures(2 if run.toy else 60, rng), rng)
    settings = {name: tune(name, tried[:1] if run.toy else tried, train) for name, tried in SETTINGS.items()}
    print(settings)
    model = run.train("Perceiver IO", build(), partial(loss, rng=rng), steps=3 if run.toy else STEPS, lr=2e-3)
    rng = Generator().manual_seed(TEST)
    textures = {"generated textures": random_textures(4 if run.toy else 300, rng), "photographs": photographs()}
    tests = {test_name: make_pairs(images[:4] if run.toy else images, rng) for test_name, images in textures.items()}
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "zero flow": lambda frames: torch.zeros_like(frames.squeeze(2)),
        "TV-L1": lambda frames: classical_flow(frames, "tvl1", **settings["tvl1"]),
        "iterative Lucas-Kanade": lambda frames: classical_flow(frames, "ilk", **settings["ilk"]),
        "Perceiver IO": partial(predict, model),
    }
    predicted = {name: {each: flow(test.frames) for each, flow in methods.items()} for name, test in tests.items()}
    tables = {}
    for test_name, test in tests.items():
        scores = {name: mean_errors(flow, test.flow) for name, flow in predicted[test_name].items()}
        tables[test_name] = compare(scores, ours="Perceiver IO", best=min)
        print(f"{test_name}\n{markdown_table(tables[test_name], 'pixels')}")
    sizes = {"train": len(train.flow), **{test_name: len(test.flow) for test_name, test in tests.items()}}
    return run.finish(draw(tests, predicted), tables=tables, data=sizes, settings=settings)


if __name__ == "__main__":
    sys.exit(run_command(main))
