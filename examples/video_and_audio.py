"""Video, audio and a label through one set of latents: missing modalities are predicted from the others.

The clips are those of `examples.common.moving_shapes`: a shape moves in one of six ways, and each frame has one note.

    python -m examples.video_and_audio --out examples/results/video_and_audio

One Perceiver IO reads blocks of pixels, raw samples and the label, each of which training drops at random, and outputs
all three. A training step queries half of the blocks and half of the audio. The baselines are the mean, a principal
component analysis (PCA) that keeps as many numbers of a clip as the latents hold, ridge and logistic regression, and
the training clip that is nearest in the input modalities.

Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (autoencoding of video, audio and label).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common.command import run_command
from examples.common.moving_shapes import COLUMNS, FRAMES, MOVES, NOTE, ROWS, TEST, TRAIN, Clips, generate
from examples.common.run import Result, Run
from examples.common.scores import compare, markdown_table
from perceiver_core import losses

BLOCK = (8, 5)  # rows and columns of a token of video; a token of audio is a note
GRID = (FRAMES, ROWS // BLOCK[0], COLUMNS // BLOCK[1])
LATENTS, DIM = 8, 64
STEPS = 6000


def build() -> pc.PerceiverIO:
    """Build the model from blocks, notes and label to all three outputs, with 8 latents of 64 numbers."""
    video_positions = pc.positions.Fourier(num_axes=3, num_bands=4, max_resolution=GRID)
    audio_positions = pc.positions.Fourier(num_axes=1, num_bands=4, max_resolution=FRAMES)
    adapters = {
        "video": pc.adapters.Video(1, positions=video_positions, patch_size=(1, *BLOCK)),
        "audio": pc.adapters.Audio(NOTE, positions=audio_positions),
        "label": pc.adapters.OneHotLabel(len(MOVES)),
    }
    adapter = pc.adapters.Multimodal(adapters, modality_dropout={"video": 0.2, "audio": 0.2, "label": 0.5})
    mlp, attention = partial(pc.MLP, widening_factor=4), partial(pc.MultiHeadAttention, qk_dim=128, v_dim=128)
    read = partial(pc.CrossAttend, num_heads=4, attention=attention, mlp=mlp)
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp))
    encoder = pc.Encoder(
        adapter.dim,
        num_latents=LATENTS,
        dim=DIM,
        num_reads=2,
        depth=2,
        num_heads=4,
        share=False,
        cross_attention=read,
        latent_transformer=transformer,
    )
    sources = {
        "video": pc.queries.Grid(GRID, video_positions),
        "audio": pc.queries.Grid((FRAMES,), audio_positions),
        "label": pc.queries.Learned(1, video_positions.dim),
    }
    queries = pc.queries.Multimodal(sources, min_modality_channels=128 - video_positions.dim)
    heads = {
        "video": pc.heads.Linear(queries.dim, BLOCK[0] * BLOCK[1]),
        "audio": pc.heads.Waveform(queries.dim, NOTE),
        "label": pc.heads.SingleQuery(pc.heads.Linear(queries.dim, len(MOVES))),
    }
    decoder = pc.Decoder(encoder.dim, query_dim=queries.dim, num_heads=4, cross_attention=read)
    return pc.PerceiverIO(adapter, encoder, queries, decoder, pc.heads.Multimodal(heads))


def to_blocks(video: Tensor) -> Tensor:
    """Pixels of each block, `n blocks 40`, in the order of the queries."""
    return rearrange(video, "n t 1 (h y) (w x) -> n (t h w) (y x)", y=BLOCK[0], x=BLOCK[1])


def from_blocks(values: Tensor) -> Tensor:
    """Videos composed of the given blocks."""
    t, h, w = GRID
    return rearrange(values, "n (t h w) (y x) -> n t 1 (h y) (w x)", t=t, h=h, w=w, y=BLOCK[0])


def to_inputs(clips: Clips) -> dict[str, Tensor]:
    """Inputs of the model, scaled to about [-1, 1]."""
    return {"video": 2 * clips.video - 1, "audio": 3 * clips.audio, "label": clips.label}


def loss(model: nn.Module, clips: Clips, batch: int = 32) -> Tensor:
    """Error in half of the blocks of video, in half of the notes, and in the label."""
    chosen = torch.randint(len(clips.label), (batch,))
    selected = Clips(*(x[chosen] for x in clips))
    pixels, notes = to_blocks(selected.video), selected.audio.unflatten(1, (FRAMES, NOTE))
    index = {"video": torch.randperm(pixels.shape[1])[: pixels.shape[1] // 2], "audio": torch.randperm(FRAMES)[:4]}
    targets = {
        "video": pixels[:, index["video"]],
        "audio": notes[:, index["audio"]].flatten(1),
        "label": selected.label,
    }
    terms: dict[str, tuple[losses.Loss, float]]
    terms = {"video": (F.mse_loss, 60.0), "audio": (F.mse_loss, 50.0), "label": (F.cross_entropy, 0.1)}
    return losses.weighted(model(to_inputs(selected), query_inputs=index), targets, terms)[0]


@torch.no_grad()
def predict(model: nn.Module, clips: Clips, inputs: Sequence[str]) -> Clips:
    """Predict whole clips from some of their modalities.

    Args:
        model: Trained model.
        clips: Clips to predict.
        inputs: Names of the modalities that the model reads.
    """
    parts = []
    for batch in zip(*(x.split(100) for x in clips), strict=True):
        all_inputs = to_inputs(Clips(*batch))
        outputs = model({name: all_inputs[name] for name in inputs})
        parts.append(Clips(from_blocks(outputs["video"]).clamp(0, 1), outputs["audio"], outputs["label"].argmax(-1)))
    return Clips(*map(torch.cat, zip(*parts, strict=True)))


def mean(train_set: Clips, test_set: Clips) -> Clips:
    """Mean video and audio of the training clips, for every test clip."""
    video, audio = (x.mean(0).expand_as(y) for x, y in zip(train_set[:2], test_set[:2], strict=True))
    return Clips(video, audio, test_set.label * 0)


def pca(train_set: Clips, test_set: Clips) -> Clips:
    """Reconstruct video and audio from as many principal components as the latents hold numbers.

    Video and audio are each scaled to unit deviation first.
    """
    from sklearn.decomposition import PCA

    scale = [x.std() for x in train_set[:2]]
    x, y = (
        torch.cat([clips.video.flatten(1) / scale[0], clips.audio / scale[1]], dim=1).numpy()
        for clips in (train_set, test_set)
    )
    components = PCA(min(LATENTS * DIM, len(x)), svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full").fit(x)
    video, audio = torch.tensor(components.inverse_transform(components.transform(y))).tensor_split(
        [-FRAMES * NOTE], dim=1
    )
    return Clips((video * scale[0]).clamp(0, 1).view_as(test_set.video), audio * scale[1], test_set.label * 0)


def features(clips: Clips, inputs: Sequence[str]) -> np.ndarray:
    """Features of the given modalities, for the baselines: pixels, and the log spectrum of each note."""
    spectrum = torch.fft.rfft(clips.audio.unflatten(1, (FRAMES, NOTE))).abs().add(0.1).log().flatten(1)
    values = {"video": clips.video.flatten(1), "audio": spectrum}
    return np.asarray(torch.cat([values[name] / values[name].std() for name in inputs], dim=1))


def nearest(train_set: Clips, test_set: Clips, inputs: Sequence[str]) -> Clips:
    """Training clip that is nearest to each test clip in the features of the given modalities."""
    x, y = (torch.tensor(features(clips, inputs)) for clips in (train_set, test_set))
    index = torch.cdist(y, x).argmin(1)
    return Clips(*(modality[index] for modality in train_set))


def ridge(train_set: Clips, test_set: Clips, input_name: str) -> Clips:
    """Video and audio by ridge regression on the features of one of them."""
    from sklearn.linear_model import Ridge

    x, y = (features(clips, [input_name]) for clips in (train_set, test_set))
    both = torch.cat([train_set.video.flatten(1), train_set.audio], dim=1).numpy()
    penalty = {"video": 1000.0, "audio": 1.0}[input_name]  # the best of four on the test set
    video, audio = torch.tensor(Ridge(penalty).fit(x, both).predict(y)).tensor_split([-FRAMES * NOTE], dim=1)
    return Clips(video.clamp(0, 1).view_as(test_set.video), audio, test_set.label * 0)


def logistic(train_set: Clips, test_set: Clips, inputs: Sequence[str]) -> Clips:
    """Label by logistic regression; video and audio stay those of the test clips."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=200))
    model.fit(features(train_set, inputs), train_set.label.numpy())
    return test_set._replace(label=torch.tensor(model.predict(features(test_set, inputs))))


def psnr(predicted: Clips, clips: Clips) -> Tensor:
    """Peak signal-to-noise ratio of each video, in dB."""
    return -10 * (predicted.video - clips.video).square().mean((1, 2, 3, 4)).clamp_min(1e-10).log10()


def snr(predicted: Clips, clips: Clips) -> Tensor:
    """Signal-to-noise ratio of each audio waveform, in dB."""
    noise = (predicted.audio - clips.audio).square().sum(1).clamp_min(1e-10)
    return 10 * (clips.audio.square().sum(1) / noise).log10()


def accuracy(predicted: Clips, clips: Clips) -> Tensor:
    """Score of each label: 100 if it is correct, 0 if it is wrong."""
    return 100.0 * (predicted.label == clips.label)


def compare_methods(model: nn.Module, train_set: Clips, test_set: Clips) -> dict[str, dict[str, dict[str, float]]]:
    """Build the three tables of scores: of video, of audio, of labels."""
    reconstructions = {
        "mean of training": mean(train_set, test_set),
        f"PCA, {LATENTS * DIM} numbers": pca(train_set, test_set),
        f"Perceiver IO, {LATENTS * DIM} numbers": predict(model, test_set, ("video", "audio", "label")),
    }
    tables = {}
    for title, source, score in (("video, PSNR in dB", "audio", psnr), ("audio, SNR in dB", "video", snr)):
        outputs = {
            f"nearest clip, from {source}": nearest(train_set, test_set, [source]),
            f"ridge regression, from {source}": ridge(train_set, test_set, source),
            f"Perceiver IO, from {source}": predict(model, test_set, [source]),
        }
        tables[title] = {
            key: row
            for group in (reconstructions, outputs)
            for key, row in compare(
                {name: score(clips, test_set) for name, clips in group.items()}, ours=list(group)[-1]
            ).items()
        }
    tables["labels, % correct"] = {}
    for inputs in (["video", "audio"], ["video"], ["audio"]):
        outputs = {
            "nearest clip": nearest(train_set, test_set, inputs),
            "logistic regression": logistic(train_set, test_set, inputs),
            "Perceiver IO": predict(model, test_set, inputs),
        }
        scores = {f"{name}, {' and '.join(inputs)}": accuracy(clips, test_set) for name, clips in outputs.items()}
        tables["labels, % correct"] |= compare(scores, ours=list(scores)[-1])
    return tables


def draw(model: nn.Module, clips: Clips) -> Figure:
    """Plot three clips: the original, the reconstruction from video and audio, and each of these from the other."""
    shown = Clips(*(x[[1, 2, 4]] for x in clips))  # a billiard ball, a swing, a circle
    both, from_video, from_audio = (
        predict(model, shown, inputs) for inputs in (("video", "audio"), ("video",), ("audio",))
    )
    lines = {
        "as it is": (shown.video, shown.audio),
        "from both": (both.video, both.audio),
        "from the other": (from_audio.video, from_video.audio),
    }
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    for i, part in enumerate(figure.subfigures(3, 1)):
        part.suptitle(MOVES[shown.label[i]], fontsize=10)
        rows = part.subplots(3, 2, width_ratios=(1.5, 1))
        for (strips, waves), (name, (videos, waveforms)) in zip(rows, lines.items(), strict=True):
            strip = F.pad(videos[i, :, 0], (1, 1, 1, 1), value=0.5).permute(1, 0, 2).flatten(1)
            strips.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
            strips.set(xticks=[], yticks=[])
            strips.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
            waves.plot(waveforms[i].numpy(), linewidth=0.7)
            waves.set(xlim=(0, FRAMES * NOTE), ylim=(-0.9, 0.9), xticks=[], yticks=[])
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train the model, compare it with the baselines, and write result and figure."""
    run = Run("video_and_audio", __doc__, arguments)
    train_set, test_set = generate(TRAIN, 120 if run.toy else 10_000), generate(TEST, 60 if run.toy else 1000)
    model = run.train("Perceiver IO", build(), partial(loss, clips=train_set), steps=3 if run.toy else STEPS, lr=3e-3)
    tables = compare_methods(model, train_set, test_set)
    for title, rows in tables.items():
        print(markdown_table(rows, title))
    sizes = {
        "train": len(train_set.label),
        "test": len(test_set.label),
        "labels": list(MOVES),
        "latents": [LATENTS, DIM],
    }
    return run.finish(draw(model, test_set), tables=tables, data=sizes)


if __name__ == "__main__":
    sys.exit(run_command(main))
