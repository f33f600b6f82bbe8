"""Recognition of ten spoken words from generated speech, with random pitch, speed, voice and onset.

A word is a sequence of sounds; a sound is two resonances (formants) of a voiced source, or hiss. Three pairs of words
have the same sounds in another order, so an average over time cannot distinguish them.

    python -m examples.spoken_words --out examples/results/spoken_words

One Perceiver reads raw samples, 64 per token; another reads a log spectrogram, in which every value is a token. The
baselines are logistic regressions on the mean log spectrum and on the whole spectrogram.

Reference: Jaegle et al. 2021 (Perceiver), section 4.2 (raw audio and mel spectrograms of AudioSet).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.common.run import Result, Run
from examples.common.scores import compare, markdown_table

RATE = 8000  # samples a second
LENGTH = 5120  # samples of a recording, 0.64 s
STEPS = 1500
NOISE = (-1.0, 0.0)  # range of log10 of its deviation, where the peak of the word is 1
HOP, BINS = 80, 32  # of the spectrogram: samples between frames, bins up to 4 kHz
TRAIN, TEST = 0, 1  # first number of the seed of each recording

# First and second resonance in Hz, amplitude of the voice, amplitude of hiss.
SOUNDS = {
    "a": (750, 1200, 1.0, 0.0),
    "e": (480, 1900, 0.9, 0.0),
    "i": (290, 2300, 0.8, 0.0),
    "o": (500, 900, 0.9, 0.0),
    "u": (310, 750, 0.8, 0.0),
    "n": (250, 1450, 0.35, 0.0),
    "s": (400, 1800, 0.0, 0.5),
}
WORDS = ("ai", "ia", "no", "on", "su", "us", "sei", "nau", "eo", "i")


class Words(NamedTuple):
    """Recordings `n samples` in [-1, 1], and the class of each."""

    samples: Tensor
    labels: Tensor


def synthesize(rng: np.random.Generator, word: str) -> np.ndarray:
    """Synthesize one recording of a word, with random pitch, resonances, speed, onset and noise."""
    num_samples = int(rng.uniform(0.28, 0.5) * RATE)
    first, second, voice, hiss = _parameter_tracks(rng, word, num_samples)
    time = np.linspace(0, 1, num_samples)
    pitch = rng.uniform(90, 240) * (1 + rng.uniform(-0.2, 0.2) * (time - 0.5) + 0.02 * np.sin(2 * np.pi * 2 * time))
    harmonics = np.arange(1, int(RATE / 2 / pitch.max()) + 1)[:, None]
    height = (harmonics * pitch).astype(np.float32)
    gain = sum(np.exp(-(((height - f) / w) ** 2) / 2) * a for f, w, a in ((first, 90, 1.0), (second, 140, 0.6)))
    angles = harmonics * np.cumsum(2 * np.pi * pitch / RATE) + rng.uniform(0, 2 * np.pi, harmonics.shape)
    voiced = voice * (gain * np.sin(np.mod(angles, 2 * np.pi).astype(np.float32))).sum(0)
    spoken = (voiced + hiss * np.diff(rng.normal(size=num_samples + 1))) * np.sin(np.pi * time) ** 0.3
    samples, onset = np.zeros(LENGTH), int(rng.integers(0, LENGTH - num_samples + 1))
    samples[onset : onset + num_samples] = spoken / np.abs(spoken).max()
    samples += 10 ** rng.uniform(*NOISE) * rng.normal(size=LENGTH)
    return (samples * rng.uniform(0.5, 1.0) / np.abs(samples).max()).astype(np.float32)


def _parameter_tracks(rng: np.random.Generator, word: str, num_samples: int) -> np.ndarray:
    """Resonances and amplitudes over time, `4 num_samples`: each sound is held for a while, then glides to the next."""
    targets = np.array([SOUNDS[sound] for sound in word], dtype=float)
    targets[:, :2] *= rng.uniform(0.87, 1.15) * rng.uniform(0.95, 1.05, (len(word), 2))  # speaker, then each sound
    ends = np.cumsum(rng.uniform(0.6, 1.4, len(word)))
    starts, ends = np.array([0, *ends[:-1]]) / ends[-1], ends / ends[-1]
    knots = np.stack([starts + 0.25 * (ends - starts), ends - 0.25 * (ends - starts)], axis=1).ravel()
    return np.stack(
        [np.interp(np.linspace(0, 1, num_samples), knots, np.repeat(track, 2)) for track in targets.T], dtype=np.float32
    )


def generate(split: int, count: int) -> Words:
    """Generate recordings of all words in turn, each with a seed of its own that no other split uses."""
    labels = torch.arange(count) % len(WORDS)
    spoken = [synthesize(np.random.default_rng([split, i]), WORDS[labels[i]]) for i in range(count)]
    return Words(torch.tensor(np.stack(spoken)), labels)


def spectrogram(samples: Tensor) -> Tensor:
    """Log power spectrogram `n bins frames`, normalized to mean 0 and deviation 1 for each recording."""
    window = torch.hann_window(256)
    power = torch.stft(samples, 256, HOP, window=window, return_complex=True).abs().square()[:, 1:, :-1]
    log = F.avg_pool1d(power.mT, 128 // BINS).mT.clamp_min(1e-6).log()
    return (log - log.mean((1, 2), keepdim=True)) / log.std((1, 2), keepdim=True)


def build(adapter: nn.Module, *, qk_dim: int) -> pc.Perceiver:
    """Build a model from the tokens of a recording to ten logits, with 32 latents.

    Args:
        adapter: Adapter that makes the tokens.
        qk_dim: Number of channels of queries and keys of the reads.
    """
    read = partial(pc.CrossAttend, num_heads=8, attention=partial(pc.MultiHeadAttention, qk_dim=qk_dim, v_dim=128))
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(
        adapter.dim,
        num_latents=32,
        dim=128,
        num_reads=2,
        depth=2,
        num_heads=4,
        cross_attention=read,
        latent_transformer=transformer,
    )
    return pc.Perceiver(adapter, encoder, pc.heads.Classification(encoder.dim, num_classes=len(WORDS)))


def waveform_model() -> pc.Perceiver:
    """Build the model that reads 80 tokens of 64 samples."""
    return build(
        pc.adapters.Audio(64, positions=pc.positions.Fourier(num_axes=1, num_bands=32, max_resolution=80)), qk_dim=256
    )


def spectrogram_model() -> pc.Perceiver:
    """Build the model that reads 32 x 64 tokens of one value."""
    positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=(BINS, 32))
    return build(pc.adapters.Spectrogram(positions=positions), qk_dim=64)


def augment(samples: Tensor) -> Tensor:
    """Shift recordings by up to 200 samples, scale them and flip the sign of some; shifted samples wrap around."""
    starts = torch.randint(-200, 201, (len(samples), 1))  # small, since a shifted word wraps around
    gain = (torch.rand(len(samples), 1) * 0.7 + 0.3) * (torch.randint(2, (len(samples), 1)) * 2 - 1)
    return gain * samples.gather(1, (starts + torch.arange(LENGTH)) % LENGTH)


def loss(model: nn.Module, words: Words, transform: Callable[[Tensor], Tensor], batch: int = 64) -> Tensor:
    """Cross-entropy on a random batch of augmented recordings."""
    chosen = torch.randint(len(words.labels), (batch,))
    return F.cross_entropy(model(transform(augment(words.samples[chosen]))), words.labels[chosen], label_smoothing=0.05)


@torch.no_grad()
def predict(model: nn.Module, words: Words, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Word that the model predicts for each recording."""
    return torch.cat([model(transform(samples)).argmax(-1) for samples in words.samples.split(100)])


def logistic_regression(features: Callable[[Tensor], Tensor], train_set: Words, test_set: Words) -> Tensor:
    """Words that a logistic regression predicts from features of the test recordings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    x, x_test = (features(words.samples).numpy() for words in (train_set, test_set))
    return torch.tensor(model.fit(x, train_set.labels.numpy()).predict(x_test))


def draw(words: Words, outputs: dict[str, Tensor]) -> Figure:
    """Plot the spectrogram of each word, and the accuracy of each model by word."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.2))
    for axes, image, word in zip(left.subplots(2, 5).flat, spectrogram(words.samples[:10]), WORDS, strict=True):
        axes.imshow(
            image.numpy(), origin="lower", aspect="auto", cmap="magma", extent=(0, LENGTH / RATE, 0, RATE / 2000)
        )
        axes.set_title(word, fontsize=10)
        axes.label_outer()
    left.supxlabel("seconds", fontsize=9)
    left.supylabel("kHz", fontsize=9)
    axes = right.subplots()
    for row, (name, predicted) in enumerate(outputs.items()):
        accuracies = [100 * (predicted == words.labels)[words.labels == i].float().mean().item() for i in range(10)]
        axes.scatter(np.arange(10) + 0.12 * (row - 1.5), accuracies, s=22, label=name)
    axes.set_xticks(range(10), WORDS)
    axes.set(ylim=(0, 103), ylabel="recognized, % of test recordings")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train both models, compare them with the baselines, and write result and figure."""
    run = Run("spoken_words", __doc__, arguments)
    train_set, test_set = generate(TRAIN, 200 if run.toy else 8000), generate(TEST, 100 if run.toy else 1000)
    models = {
        "Perceiver, raw samples": (waveform_model, nn.Identity()),
        "Perceiver, spectrogram": (spectrogram_model, spectrogram),
    }
    outputs = {
        "logistic regression, mean spectrum": logistic_regression(
            lambda x: spectrogram(x).mean(2), train_set, test_set
        ),
        "logistic regression, spectrogram": logistic_regression(
            lambda x: spectrogram(x).flatten(1), train_set, test_set
        ),
    }
    for name, (build_model, transform) in models.items():
        model = run.train(
            name, build_model(), partial(loss, words=train_set, transform=transform), steps=3 if run.toy else STEPS
        )
        outputs[name] = predict(model, test_set, transform)
    correct = {name: 100.0 * (predicted == test_set.labels) for name, predicted in outputs.items()}
    rows = compare(correct, ours="Perceiver, raw samples")
    print(markdown_table(rows, "correct, %"))
    sizes = {
        "train": len(train_set.labels),
        "test": len(test_set.labels),
        "words": list(WORDS),
        "chance": 100 / len(WORDS),
    }
    return run.finish(draw(test_set, outputs), tables={"correct, %": rows}, data=sizes)


if __name__ == "__main__":
    main()
