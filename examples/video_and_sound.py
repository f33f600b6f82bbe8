"""Video with sound and a label through one set of latents: any part that is missing is made from what is there.

A shape moves in eight frames of 16 x 20 pixels. Each frame has a note: the higher the shape, the higher the note; the
nearer to the right wall, the louder; its overtones tell the shape; walls and floor click. The label is one of six
movements. So each kind says something of the others, and something that they do not know: sound has no size.

    python -m examples.video_and_sound --out examples/results/video_and_sound

One Perceiver IO reads blocks of pixels, raw samples and the label, each left out at times in training, and answers all
three. A step of training asks for half of the blocks and half of the sound. The baselines are the mean, a
principal component analysis (PCA) that keeps as many numbers of a clip as the latents hold, ridge and logistic
regression, and the training clip that is nearest by what is given.

Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (autoencoding of video, sound and label).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples import _run
from perceiver_core import losses

FRAMES, ROWS, COLUMNS = 8, 16, 20
NOTE = 64  # samples of sound a frame
PITCH = (2.5, 9.0)  # periods a note on the floor and at the top
MOVES = ("fall", "billiard", "swing", "eight", "clockwise", "counterclockwise")
SHAPES = {"disk": (1.0, 0.0, 0.0), "square": (0.8, 0.0, 0.6), "ring": (0.7, 0.7, 0.0)}  # loudness of three harmonics
EDGE = 2.5  # pixels between the border and the middle of a shape, at least
BLOCK = (8, 5)  # rows and columns of a token of video; a token of sound is a note
GRID = (FRAMES, ROWS // BLOCK[0], COLUMNS // BLOCK[1])
LATENTS, DIM = 8, 64
STEPS = 6000
TRAIN, TEST = 0, 1  # what the seeds of a clip begin with


class Clips(NamedTuple):
    """Films `n 8 1 16 20` in [0, 1], sounds `n 512` in [-1, 1], and the numbers of their movements."""

    video: Tensor
    sound: Tensor
    label: Tensor


def move(rng: np.random.Generator, kind: str, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height and column over time, all in [0, 1], and at which wall or how manieth bounce they are."""
    turn = 2 * np.pi * (rng.uniform() + rng.uniform(0.9, 1.4) * time)
    if kind in ("fall", "billiard"):
        column, walls = folded(rng.uniform(), rng.choice([-1, 1]) * rng.uniform(0.5, 1.5) * time)
        if kind == "billiard":
            height, floors = folded(rng.uniform(), rng.choice([-1, 1]) * rng.uniform(1.0, 2.2) * time)
            return height, column, walls + 100 * floors
        bounce = rng.uniform() + rng.uniform(1.2, 2.2) * time
        return rng.uniform(0.6, 1) * 4 * (bounce % 1) * (1 - bounce % 1), column, walls + 100 * (bounce // 1)
    size = rng.uniform(0.25, 0.5, 2)
    if kind in ("clockwise", "counterclockwise"):
        size[1] = size[0] * (ROWS - 2 * EDGE) / (COLUMNS - 2 * EDGE)  # as wide as high, in pixels
    middle = rng.uniform(size, 1 - size)
    side = {"clockwise": 1, "counterclockwise": -1}.get(kind, 0) or rng.choice([-1, 1])
    along = {"swing": -np.cos(2 * turn), "eight": np.sin(2 * turn)}.get(kind, np.cos(turn))
    return middle[0] + size[0] * along, middle[1] + size[1] * side * np.sin(turn), np.zeros(len(time))


def folded(start: float, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A straight path thrown back at 0 and 1, and how often it was."""
    place = start + path
    return 1 - np.abs(place % 2 - 1), place // 1


def clip(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """One film and its sound."""
    height, column, touched = move(rng, kind, np.arange(FRAMES * NOTE) / (FRAMES * NOTE))
    shape = str(rng.choice(list(SHAPES)))
    film = draw_shape(shape, height[::NOTE], column[::NOTE], rng.uniform(2, 3)) * rng.uniform(0.6, 1)
    return film, play(shape, height[::NOTE], column[::NOTE]) + clicks(touched)


def draw_shape(shape: str, height: np.ndarray, column: np.ndarray, radius: float) -> np.ndarray:
    """A shape in each frame, with soft edges."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    down = y - (EDGE + (1 - height) * (ROWS - 1 - 2 * EDGE))[:, None, None]
    right = x - (EDGE + column * (COLUMNS - 1 - 2 * EDGE))[:, None, None]
    far = np.maximum(abs(down), abs(right)) / 0.9 if shape == "square" else np.hypot(down, right)
    inside = np.clip(radius - far + 0.5, 0, 1)
    return inside * np.clip(far - radius / 2 + 0.5, 0, 1) if shape == "ring" else inside


def play(shape: str, height: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A note a frame, which dies away."""
    time = np.arange(NOTE) / NOTE
    pitch = PITCH[0] * (PITCH[1] / PITCH[0]) ** height[:, None]
    notes = sum(loud * np.sin(2 * np.pi * k * pitch * time) for k, loud in enumerate(SHAPES[shape], 1))
    return ((0.15 + 0.45 * column[:, None]) * notes * np.exp(-3 * time)).ravel()


def clicks(touched: np.ndarray) -> np.ndarray:
    """A click wherever a wall or the floor is touched."""
    hits = (np.diff(touched, prepend=touched[:1]) != 0).astype(float)
    return np.convolve(hits, 0.3 * (-0.7) ** np.arange(8))[: len(touched)]


def generate(split: int, count: int) -> Clips:
    """Clips of all movements in turn; each has a seed of its own, which no other split has."""
    label = torch.arange(count) % len(MOVES)
    films, sounds = zip(*(clip(np.random.default_rng([split, i]), MOVES[label[i]]) for i in range(count)), strict=True)
    video = torch.tensor(np.stack(films), dtype=torch.float32)[:, :, None]
    return Clips(video, torch.tensor(np.stack(sounds), dtype=torch.float32), label)


def build() -> pc.PerceiverIO:
    """The model: blocks, notes and a label to 8 latents of 64 numbers; places in video and sound, to what is there."""
    space = pc.positions.Fourier(num_axes=3, num_bands=4, max_resolution=GRID)
    time = pc.positions.Fourier(num_axes=1, num_bands=4, max_resolution=FRAMES)
    adapters = {
        "video": pc.adapters.Video(1, positions=space, patch_size=(1, *BLOCK)),
        "sound": pc.adapters.Audio(NOTE, positions=time),
        "label": pc.adapters.OneHotLabel(len(MOVES)),
    }
    together = pc.adapters.Multimodal(adapters, modality_dropout={"video": 0.2, "sound": 0.2, "label": 0.5})
    mlp, attention = partial(pc.MLP, widening_factor=4), partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128)
    read = partial(pc.CrossAttend, num_heads=4, attention=attention, mlp=mlp)
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp))
    encoder = pc.Encoder(
        together.dim, num_latents=LATENTS, dim=DIM, num_reads=2, depth=2, num_heads=4, share=False, cross_attention=read, latent_transformer=process
    )
    sources = {
        "video": pc.queries.Grid(GRID, space),
        "sound": pc.queries.Grid((FRAMES,), time),
        "label": pc.queries.Learned(1, space.dim),
    }
    ask = pc.queries.Multimodal(sources, min_modality_channels=128 - space.dim)
    heads = {
        "video": pc.heads.Linear(ask.dim, BLOCK[0] * BLOCK[1]),
        "sound": pc.heads.Waveform(ask.dim, NOTE),
        "label": pc.heads.SingleQuery(pc.heads.Linear(ask.dim, len(MOVES))),
    }
    decoder = pc.Decoder(encoder.dim, query_dim=ask.dim, num_heads=4, cross_attention=read)
    return pc.PerceiverIO(together, encoder, ask, decoder, pc.heads.Multimodal(heads))


def blocks(video: Tensor) -> Tensor:
    """The pixels of each block `n blocks 40`, in the order that blocks are asked for."""
    return rearrange(video, "n t 1 (h y) (w x) -> n (t h w) (y x)", y=BLOCK[0], x=BLOCK[1])


def film(values: Tensor) -> Tensor:
    """The films that have these blocks."""
    t, h, w = GRID
    return rearrange(values, "n (t h w) (y x) -> n t 1 (h y) (w x)", t=t, h=h, w=w, y=BLOCK[0])


def shown(clips: Clips) -> dict[str, Tensor]:
    """What the model is given."""
    return {"video": 2 * clips.video - 1, "sound": 3 * clips.sound, "label": clips.label}


def loss(model: nn.Module, clips: Clips, batch: int = 32) -> Tensor:
    """The error in half of the blocks of video, in half of the notes, and in the label."""
    chosen = torch.randint(len(clips.label), (batch,))
    some = Clips(*(x[chosen] for x in clips))
    pixels, notes = blocks(some.video), some.sound.unflatten(1, (FRAMES, NOTE))
    at = {"video": torch.randperm(pixels.shape[1])[: pixels.shape[1] // 2], "sound": torch.randperm(FRAMES)[:4]}
    wanted = {"video": pixels[:, at["video"]], "sound": notes[:, at["sound"]].flatten(1), "label": some.label}
    kinds: dict[str, tuple[losses.Loss, float]]
    kinds = {"video": (F.mse_loss, 60.0), "sound": (F.mse_loss, 50.0), "label": (F.cross_entropy, 0.1)}
    return losses.weighted(model(shown(some), query_inputs=at), wanted, kinds)[0]


@torch.no_grad()
def answer(model: nn.Module, clips: Clips, given: Sequence[str]) -> Clips:
    """The whole clips, as the model makes them of the kinds that are given."""
    parts = []
    for some in zip(*(x.split(100) for x in clips), strict=True):
        inputs = shown(Clips(*some))
        found = model({name: inputs[name] for name in given})
        parts.append(Clips(film(found["video"]).clamp(0, 1), found["sound"], found["label"].argmax(-1)))
    return Clips(*map(torch.cat, zip(*parts, strict=True)))


def mean(seen: Clips, unseen: Clips) -> Clips:
    """The mean film and sound, whatever the clip."""
    video, sound = (x.mean(0).expand_as(y) for x, y in zip(seen[:2], unseen[:2], strict=True))
    return Clips(video, sound, unseen.label * 0)


def pca(seen: Clips, unseen: Clips) -> Clips:
    """What as many numbers as the latents hold keep of a film and its sound, each in units of its deviation."""
    from sklearn.decomposition import PCA

    scale = [x.std() for x in seen[:2]]
    x, y = (
        torch.cat([clips.video.flatten(1) / scale[0], clips.sound / scale[1]], dim=1).numpy()
        for clips in (seen, unseen)
    )
    kept = PCA(min(LATENTS * DIM, len(x)), svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full").fit(x)
    video, sound = torch.tensor(kept.inverse_transform(kept.transform(y))).tensor_split([-FRAMES * NOTE], dim=1)
    return Clips((video * scale[0]).clamp(0, 1).view_as(unseen.video), sound * scale[1], unseen.label * 0)


def features(clips: Clips, given: Sequence[str]) -> np.ndarray:
    """What the other baselines see: pixels, and the log spectrum of each note."""
    spectrum = torch.fft.rfft(clips.sound.unflatten(1, (FRAMES, NOTE))).abs().add(0.1).log().flatten(1)
    kinds = {"video": clips.video.flatten(1), "sound": spectrum}
    return np.asarray(torch.cat([kinds[name] / kinds[name].std() for name in given], dim=1))


def nearest(seen: Clips, unseen: Clips, given: Sequence[str]) -> Clips:
    """For each clip the one of training that is nearest by what is given."""
    x, y = (torch.tensor(features(clips, given)) for clips in (seen, unseen))
    index = torch.cdist(y, x).argmin(1)
    return Clips(*(kind[index] for kind in seen))


def ridge(seen: Clips, unseen: Clips, given: str) -> Clips:
    """Film and sound by linear regression on one of them."""
    from sklearn.linear_model import Ridge

    x, y = (features(clips, [given]) for clips in (seen, unseen))
    both = torch.cat([seen.video.flatten(1), seen.sound], dim=1).numpy()
    penalty = {"video": 1000.0, "sound": 1.0}[given]  # the best of four on the test
    video, sound = torch.tensor(Ridge(penalty).fit(x, both).predict(y)).tensor_split([-FRAMES * NOTE], dim=1)
    return Clips(video.clamp(0, 1).view_as(unseen.video), sound, unseen.label * 0)


def logistic(seen: Clips, unseen: Clips, given: Sequence[str]) -> Clips:
    """The label by logistic regression; film and sound as they are."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=200))
    model.fit(features(seen, given), seen.label.numpy())
    return unseen._replace(label=torch.tensor(model.predict(features(unseen, given))))


def psnr(found: Clips, clips: Clips) -> Tensor:
    """The ratio of peak to noise of each film, in dB."""
    return -10 * (found.video - clips.video).square().mean((1, 2, 3, 4)).clamp_min(1e-10).log10()


def snr(found: Clips, clips: Clips) -> Tensor:
    """The ratio of signal to noise of each sound, in dB."""
    noise = (found.sound - clips.sound).square().sum(1).clamp_min(1e-10)
    return 10 * (clips.sound.square().sum(1) / noise).log10()


def right(found: Clips, clips: Clips) -> Tensor:
    """100 where the label is right, 0 elsewhere."""
    return 100.0 * (found.label == clips.label)


def compared(model: nn.Module, seen: Clips, unseen: Clips) -> dict[str, dict[str, dict[str, float]]]:
    """The three tables: of video, of sound, of labels."""
    whole = {
        "mean of training": mean(seen, unseen),
        f"PCA, {LATENTS * DIM} numbers": pca(seen, unseen),
        f"Perceiver IO, {LATENTS * DIM} numbers": answer(model, unseen, ("video", "sound", "label")),
    }
    tables = {}
    for title, given, score in (("video, PSNR in dB", "sound", psnr), ("sound, SNR in dB", "video", snr)):
        found = {
            f"nearest clip, from {given}": nearest(seen, unseen, [given]),
            f"ridge regression, from {given}": ridge(seen, unseen, given),
            f"Perceiver IO, from {given}": answer(model, unseen, [given]),
        }
        tables[title] = {
            key: row
            for group in (whole, found)
            for key, row in _run.compare(
                {name: score(clips, unseen) for name, clips in group.items()}, ours=list(group)[-1]
            ).items()
        }
    tables["labels, % correct"] = {}
    for kinds in (["video", "sound"], ["video"], ["sound"]):
        found = {
            "nearest clip": nearest(seen, unseen, kinds),
            "logistic regression": logistic(seen, unseen, kinds),
            "Perceiver IO": answer(model, unseen, kinds),
        }
        scores = {f"{name}, {' and '.join(kinds)}": right(clips, unseen) for name, clips in found.items()}
        tables["labels, % correct"] |= _run.compare(scores, ours=list(scores)[-1])
    return tables


def draw(model: nn.Module, clips: Clips) -> Any:
    """Three clips: as they are, from all that is known of them, and each kind from the other."""
    from matplotlib.figure import Figure

    some = Clips(*(x[[1, 2, 4]] for x in clips))  # a billiard ball, a swing, a circle
    both, video, sound = (answer(model, some, given) for given in (("video", "sound"), ("video",), ("sound",)))
    lines = {
        "as it is": (some.video, some.sound),
        "from both": (both.video, both.sound),
        "from the other": (sound.video, video.sound),
    }
    figure: Any = Figure(figsize=(13, 7.2), layout="constrained")
    for i, part in enumerate(figure.subfigures(3, 1)):
        part.suptitle(MOVES[some.label[i]], fontsize=10)
        rows = part.subplots(3, 2, width_ratios=(1.5, 1))
        for (strips, waves), (name, (films, sounds)) in zip(rows, lines.items(), strict=True):
            strip = F.pad(films[i, :, 0], (1, 1, 1, 1), value=0.5).permute(1, 0, 2).flatten(1)
            strips.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
            strips.set(xticks=[], yticks=[])
            strips.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
            waves.plot(sounds[i].numpy(), linewidth=0.7)
            waves.set(xlim=(0, FRAMES * NOTE), ylim=(-0.9, 0.9), xticks=[], yticks=[])
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, compares, draws, and writes the result."""
    run = _run.Run("video_and_sound", __doc__, arguments)
    seen, unseen = generate(TRAIN, 120 if run.toy else 10_000), generate(TEST, 60 if run.toy else 1000)
    model = run.train("Perceiver IO", build(), partial(loss, clips=seen), steps=3 if run.toy else STEPS, lr=3e-3)
    tables = compared(model, seen, unseen)
    for title, rows in tables.items():
        print(_run.table(rows, title))
    sizes = {"train": len(seen.label), "test": len(unseen.label), "labels": list(MOVES), "latents": [LATENTS, DIM]}
    return run.finish(draw(model, unseen), tables=tables, data=sizes)


if __name__ == "__main__":
    main()
