"""How far every pixel moved from one frame to the next, learned from generated pairs, asked of photographs.

A texture is moved by a smooth flow of at most four pixels: frame 1 is the texture at x + flow(x), frame 2 at x. Frame 2
has another gain and gamma, and both have noise. Training sees generated textures alone (smooth noise, stripes, discs),
every pair once. The test has other textures of that kind, and scikit-learn's two photographs, which no training saw.

    python -m examples.optical_flow --out examples/results/optical_flow

A token is a pixel with its neighborhood in both frames, and a query is a token. Unlike in the paper, neighborhoods are
7 x 7 and queries are added to what they read. Training asks for 192 of the 768 pixels at a time; the test asks for all,
in chunks. The baselines are scikit-image's TV-L1 and iterative Lucas-Kanade, with the settings that do best on training
pairs. Errors are over pixels that are in both frames.

Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 (optical flow).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples import _run
from perceiver_core.losses import end_point_error

HIGH, WIDE = 24, 32  # of a frame
LONGEST = (1.0, 4.0)  # pixels that the fastest pixel of a pair moves
MARGIN = 5  # pixels of a texture around a frame
FINE = 2  # pixels of a texture in one of a frame, along each axis
TEXTURE = (FINE * (HIGH + 2 * MARGIN), FINE * (WIDE + 2 * MARGIN))
PATCH = 7
STEPS = 2200
BATCH = 16
ASKED = 192  # pixels that a step of training asks for
TRAIN, TEST = 0, 1  # seeds of the pairs
ZOOMS = (1, 2, 3)  # of the frames, for the baselines
GRIDS: dict[str, list[dict[str, Any]]] = {
    "tvl1": [{"zoom": zoom, "attachment": a, "num_warp": 10} for zoom in ZOOMS for a in (2, 5, 10)],
    "ilk": [{"zoom": zoom, "radius": zoom * r, "gaussian": True} for zoom in ZOOMS for r in (3, 5, 7)],
}


class Pairs(NamedTuple):
    """Frames `n 2 1 h w`, each with mean 0 and deviation about 1; flow `n 2 h w` in pixels, rows before columns."""

    frames: Tensor
    flow: Tensor


def generated(count: int, rng: Generator) -> Tensor:
    """Textures `n 1 h w` in [0, 1]: mixtures of noise at several scales, stripes and discs."""
    high, wide = TEXTURE
    rows, columns = torch.meshgrid(torch.arange(high) / FINE, torch.arange(wide) / FINE, indexing="ij")
    layers = []
    for scale in (3, 6, 12):  # pixels of a frame between values of the noise
        coarse = torch.randn(count, 1, high // (FINE * scale) + 2, wide // (FINE * scale) + 2, generator=rng)
        layers.append(F.interpolate(coarse, TEXTURE, mode="bicubic", align_corners=True))
    angle, phase = 2 * torch.pi * torch.rand(2, count, 1, 1, 1, generator=rng)
    length = 4 * 4 ** torch.rand(count, 1, 1, 1, generator=rng)  # 4 to 16 pixels a stripe
    layers.append(torch.sin(2 * torch.pi * (angle.cos() * rows + angle.sin() * columns) / length + phase))
    discs = torch.zeros(count, 1, high, wide)
    for _ in range(12):
        y, x, radius, shade = torch.rand(4, count, 1, 1, 1, generator=rng)
        away = ((rows - y * high / FINE).square() + (columns - x * wide / FINE).square()).sqrt()
        discs = discs.lerp(shade.expand_as(discs), torch.sigmoid(2 * (2 + 5 * radius - away)))  # over those before
    layers.append(discs)
    mixed = torch.stack([_share(count, rng) * normalized(layer) for layer in layers]).sum(0)
    contrast = 0.3 + 1.7 * torch.rand(count, 1, 1, 1, generator=rng)
    return torch.sigmoid(contrast * normalized(mixed))


def _share(count: int, rng: Generator) -> Tensor:
    """How much of a layer each texture has; of many it has little."""
    return torch.rand(count, 1, 1, 1, generator=rng) ** 2


def photographs() -> Tensor:
    """Crops `n 1 h w` of two photographs, side by side, in gray, but for those that show nothing."""
    from sklearn.datasets import load_sample_images

    gray = torch.tensor(np.stack(load_sample_images().images)).float().mean(-1, keepdim=True).permute(0, 3, 1, 2) / 255
    smooth = F.avg_pool2d(F.pad(gray, (1, 0, 1, 0), mode="replicate"), FINE, stride=1)  # of what a frame cannot show
    crops = smooth.unfold(2, TEXTURE[0], TEXTURE[0]).unfold(3, TEXTURE[1], TEXTURE[1])
    crops = crops.reshape(-1, 1, *TEXTURE)
    return crops[crops.std((1, 2, 3)) > 0.05]  # not of the sky


def flows(count: int, rng: Generator) -> Tensor:
    """Smooth flows `n 2 h w`: a translation, a linear map, and a field that bends."""
    places = torch.stack([torch.ones(HIGH, WIDE), *_grid(HIGH, WIDE)])
    affine = torch.randn(count, 2, 3, generator=rng) * torch.tensor([1.0, 0.5, 0.5])
    bends = F.interpolate(torch.randn(count, 2, 4, 5, generator=rng), (HIGH, WIDE), mode="bicubic", align_corners=True)
    flow = torch.einsum("ncp,phw->nchw", affine, places) + 0.5 * bends
    low, high = LONGEST
    longest = low + (high - low) * torch.rand(count, 1, 1, 1, generator=rng)
    return flow * longest / flow.norm(dim=1, keepdim=True).amax((2, 3), keepdim=True)


def _grid(high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Rows and columns from -1 to 1."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, high), torch.linspace(-1, 1, wide), indexing="ij")
    return rows, columns


def warped(textures: Tensor, flow: Tensor) -> Tensor:
    """Two frames `n 2 1 h w` of each texture: where the flow leads to, and as it is."""
    pixels = torch.stack(torch.meshgrid(torch.arange(HIGH), torch.arange(WIDE), indexing="ij")).float()
    places = torch.stack([pixels + flow, pixels.expand_as(flow)], dim=1) + MARGIN  # n 2 2 h w
    size = torch.tensor(TEXTURE)[:, None, None] - 1
    at = (2 * FINE * places / size - 1).flip(2).flatten(0, 1).movedim(1, -1)  # columns first, from -1 to 1
    found = F.grid_sample(textures.repeat_interleave(2, 0), at, mode="bicubic", align_corners=True)
    return found.clamp(0, 1).unflatten(0, (-1, 2))


def lit(frames: Tensor, rng: Generator) -> Tensor:
    """The second frame in another light, noise on both."""
    gain, gamma = 1.3 ** (2 * torch.rand(2, len(frames), 1, 1, 1, generator=rng) - 1)
    second = gain * frames[:, 1] ** gamma
    noise = 0.04 * torch.rand(len(frames), 1, 1, 1, 1, generator=rng)
    return torch.stack([frames[:, 0], second], dim=1) + noise * torch.randn(frames.shape, generator=rng)


def normalized(pictures: Tensor) -> Tensor:
    """Each picture less its mean, over its deviation, flat ones over a little more."""
    deviation = pictures.std((-2, -1), keepdim=True) + 0.02
    return (pictures - pictures.mean((-2, -1), keepdim=True)) / deviation


def pairs(textures: Tensor, rng: Generator) -> Pairs:
    """A pair of frames of each texture."""
    flow = flows(len(textures), rng)
    return Pairs(normalized(lit(warped(textures, flow), rng)), flow)


def seen_twice(flow: Tensor) -> Tensor:
    """`n h w`, whether a pixel of frame 1 is still in frame 2."""
    rows, columns = torch.arange(HIGH)[:, None] + flow[:, 0], torch.arange(WIDE) + flow[:, 1]
    return (rows >= 0) & (rows <= HIGH - 1) & (columns >= 0) & (columns <= WIDE - 1)


def build() -> pc.PerceiverIO:
    """The model: a token a pixel to 32 latents; a token, to its flow."""
    where = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=(HIGH, WIDE))
    pair = pc.adapters.FramePair(positions=where, num_channels=1, patch_size=PATCH, dim=128 - where.dim)
    attention = partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128)
    read = partial(pc.CrossAttend, num_heads=8, attention=attention, mlp=partial(pc.MLP, widening_factor=2))
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(pair.dim, num_latents=32, dim=128, depth=2, num_heads=4, cross_attention=read, latent_transformer=process)
    ask = pc.queries.FromInputs(pair.dim)
    answer = partial(pc.CrossAttend, residual=True, attention=attention, mlp=partial(pc.MLP, widening_factor=4))
    decoder = pc.Decoder(encoder.dim, query_dim=ask.dim, out_dim=2, num_heads=8, cross_attention=answer, chunk_size=256)
    return pc.PerceiverIO(pair, encoder, ask, decoder, pc.heads.Grid((HIGH, WIDE), scale=0.25))


def loss(model: nn.Module, rng: Generator) -> Tensor:
    """The mean end-point error at some pixels of pairs that were never there before."""
    frames, flow = pairs(generated(BATCH, rng), rng)
    at = torch.rand(BATCH, HIGH * WIDE).argsort(1)[:, :ASKED]
    wanted = flow.flatten(2).mT.gather(1, at[..., None].expand(-1, -1, 2))
    return end_point_error(model(frames, query_inputs=at), wanted)


@torch.no_grad()
def answers(model: nn.Module, frames: Tensor) -> Tensor:
    """The flow of each pair as the model sees it, at all pixels."""
    return torch.cat([model(some) for some in frames.split(50)])


def classical(frames: Tensor, method: str, *, zoom: int, **settings: Any) -> Tensor:
    """The flow of each pair by a method of scikit-image, of enlarged frames, since small ones have no pyramid."""
    try:
        from skimage import registration
    except ImportError as error:
        raise ImportError("the baselines need scikit-image: pip install scikit-image") from error
    solve = partial(getattr(registration, f"optical_flow_{method}"), **settings)
    size = (HIGH * zoom, WIDE * zoom)
    large = F.interpolate(frames.flatten(0, 1), size, mode="bicubic", align_corners=False).unflatten(0, (-1, 2))
    found = torch.tensor(np.stack([solve(first, second) for first, second in large.squeeze(2).numpy()]))
    return F.avg_pool2d(found, zoom) / zoom


def tuned(method: str, settings: Sequence[dict[str, Any]], train: Pairs) -> dict[str, Any]:
    """The settings that do best on some pairs."""
    return min(settings, key=lambda chosen: errors(classical(train.frames, method, **chosen), train.flow).mean().item())


def errors(found: Tensor, flow: Tensor) -> Tensor:
    """The mean end-point error of each pair in pixels, over what is in both frames."""
    each = zip(found, flow, seen_twice(flow), strict=True)
    return torch.stack([end_point_error(a[None], b[None], there[None]) for a, b, there in each])


def colors(flow: Tensor) -> np.ndarray:
    """A flow `2 h w` as a picture: the hue is its direction, white is none."""
    from matplotlib.colors import hsv_to_rgb

    hue = torch.atan2(flow[0], flow[1]) / (2 * torch.pi) % 1
    strength = (flow.norm(dim=0) / LONGEST[1]).clamp(max=1)
    return np.asarray(hsv_to_rgb(torch.stack([hue, strength, torch.ones_like(hue)], -1).numpy()))


def draw(tests: dict[str, Pairs], found: dict[str, dict[str, Tensor]], several: int = 3) -> Any:
    """Some pairs of each kind: the frames, the true flow, and what each method found, with its error."""
    from matplotlib.figure import Figure

    names = [name for name in next(iter(found.values())) if name != "zero flow"]
    rows = [(kind, i * len(test.flow) // several) for kind, test in tests.items() for i in range(several)]
    figure = Figure(figsize=(1.75 * (3 + len(names)) + 1.4, 1.3 * len(rows) + 0.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.75 * (3 + len(names)), 1.4))
    for line, (kind, i) in zip(left.subplots(len(rows), 3 + len(names)), rows, strict=True):
        first, second = tests[kind].frames[i, :, 0].numpy()
        shown = {"frame 1": first, "frame 2": second, "true flow": colors(tests[kind].flow[i])}
        shown |= {name: colors(found[kind][name][i]) for name in names}
        for axes, (name, picture) in zip(line, shown.items(), strict=True):
            axes.imshow(picture, cmap="gray")
            axes.set(xticks=[], yticks=[])
            if (kind, i) == rows[0]:
                axes.set_title(name, fontsize=10)
            if name in names:
                error = errors(found[kind][name][i, None], tests[kind].flow[i, None]).item()
                axes.text(1, 3, f"{error:.2f}", fontsize=8, bbox={"color": "white", "alpha": 0.6, "pad": 1})
        line[0].set_ylabel(kind.split()[0], fontsize=10)
    wheel = right.subplots()
    disc = LONGEST[1] * torch.stack(_grid(101, 101))
    inside = disc.norm(dim=0) <= LONGEST[1]
    wheel.imshow(np.where(inside[..., None], colors(disc), 1))
    wheel.axis("off")
    wheel.set_title(f"radius {LONGEST[1]:.0f} pixels", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, tunes the baselines, compares, draws, and writes the result."""
    run = _run.Run("optical_flow", __doc__, arguments)
    rng = Generator().manual_seed(TRAIN)
    train = pairs(generated(2 if run.toy else 60, rng), rng)
    settings = {method: tuned(method, grid[:1] if run.toy else grid, train) for method, grid in GRIDS.items()}
    print(settings)
    model = run.train("Perceiver IO", build(), partial(loss, rng=rng), steps=3 if run.toy else STEPS, lr=2e-3)
    rng = Generator().manual_seed(TEST)
    textures = {"generated textures": generated(4 if run.toy else 300, rng), "photographs": photographs()}
    tests = {kind: pairs(some[:4] if run.toy else some, rng) for kind, some in textures.items()}
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "zero flow": lambda frames: torch.zeros_like(frames.squeeze(2)),
        "TV-L1": lambda frames: classical(frames, "tvl1", **settings["tvl1"]),
        "iterative Lucas-Kanade": lambda frames: classical(frames, "ilk", **settings["ilk"]),
        "Perceiver IO": partial(answers, model),
    }
    found = {kind: {name: way(test.frames) for name, way in ways.items()} for kind, test in tests.items()}
    tables = {}
    for kind, test in tests.items():
        scores = {name: errors(flow, test.flow) for name, flow in found[kind].items()}
        tables[kind] = _run.compare(scores, ours="Perceiver IO", best=min)
        print(f"{kind}\n{_run.table(tables[kind], 'pixels')}")
    sizes = {"train": len(train.flow), **{kind: len(test.flow) for kind, test in tests.items()}}
    return run.finish(draw(tests, found), tables=tables, data=sizes, settings=settings)


if __name__ == "__main__":
    main()
