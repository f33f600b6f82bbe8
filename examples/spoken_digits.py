"""Ten spoken words from the waveform alone: generated speech, with a pitch, a speed, a voice and an onset of its own.

A word is a row of sounds; a sound is two resonances (formants) of a buzzing voice, or hiss. Three pairs of words are
the same sounds in another order, which an average over time cannot tell apart.

    python -m examples.spoken_digits --out examples/results/spoken_digits

One Perceiver reads raw samples, 64 a token; another a log spectrogram, in which every value is a token. The baselines
are logistic regressions, on the mean log spectrum and on the whole spectrogram.

Reference: Jaegle et al. 2021 (Perceiver), section 4.2 (raw sound and mel spectrograms of AudioSet).
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

RATE = 8000  # samples a second
LENGTH = 5120  # samples of a recording, 0.64 s
STEPS = 1500
NOISE = (-1.0, 0.0)  # the power of ten of its deviation, where the peak of the word is 1
HOP, BINS = 80, 32  # of the spectrogram: samples between frames, bins up to 4 kHz
TRAIN, TEST = 0, 1  # what the seeds of a recording begin with

# First and second resonance in Hz, loudness of the voice, loudness of hiss.
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
    """Recordings `n samples` in [-1, 1], and the numbers of their words."""

    samples: Tensor
    labels: Tensor


def speak(rng: np.random.Generator, word: str) -> np.ndarray:
    """One recording of a word: a voice of some pitch and size, at some speed, somewhere in noise."""
    long = int(rng.uniform(0.28, 0.5) * RATE)
    first, second, voice, hiss = _tracks(rng, word, long)
    time = np.linspace(0, 1, long)
    pitch = rng.uniform(90, 240) * (1 + rng.uniform(-0.2, 0.2) * (time - 0.5) + 0.02 * np.sin(2 * np.pi * 2 * time))
    harmonics = np.arange(1, int(RATE / 2 / pitch.max()) + 1)[:, None]
    height = (harmonics * pitch).astype(np.float32)
    loud = sum(np.exp(-(((height - f) / w) ** 2) / 2) * a for f, w, a in ((first, 90, 1.0), (second, 140, 0.6)))
    angles = harmonics * np.cumsum(2 * np.pi * pitch / RATE) + rng.uniform(0, 2 * np.pi, harmonics.shape)
    voiced = voice * (loud * np.sin(np.mod(angles, 2 * np.pi).astype(np.float32))).sum(0)
    spoken = (voiced + hiss * np.diff(rng.normal(size=long + 1))) * np.sin(np.pi * time) ** 0.3
    samples, onset = np.zeros(LENGTH), int(rng.integers(0, LENGTH - long + 1))
    samples[onset : onset + long] = spoken / np.abs(spoken).max()
    samples += 10 ** rng.uniform(*NOISE) * rng.normal(size=LENGTH)
    return (samples * rng.uniform(0.5, 1.0) / np.abs(samples).max()).astype(np.float32)


def _tracks(rng: np.random.Generator, word: str, long: int) -> np.ndarray:
    """Resonances and loudness over time: each sound is held for a while, and glides to the next."""
    targets = np.array([SOUNDS[sound] for sound in word], dtype=float)
    targets[:, :2] *= rng.uniform(0.87, 1.15) * rng.uniform(0.95, 1.05, (len(word), 2))  # a head's size, a mood
    ends = np.cumsum(rng.uniform(0.6, 1.4, len(word)))
    starts, ends = np.array([0, *ends[:-1]]) / ends[-1], ends / ends[-1]
    held = np.stack([starts + 0.25 * (ends - starts), ends - 0.25 * (ends - starts)], axis=1).ravel()
    return np.stack(
        [np.interp(np.linspace(0, 1, long), held, np.repeat(track, 2)) for track in targets.T], dtype=np.float32
    )


def generate(split: int, count: int) -> Words:
    """Recordings of all words in turn; each has a seed of its own, which no other split has."""
    labels = torch.arange(count) % len(WORDS)
    spoken = [speak(np.random.default_rng([split, i]), WORDS[labels[i]]) for i in range(count)]
    return Words(torch.tensor(np.stack(spoken)), labels)


def spectrogram(samples: Tensor) -> Tensor:
    """Log power `n bins frames`, about 0 in the mean and 1 in deviation for each recording."""
    window = torch.hann_window(256)
    power = torch.stft(samples, 256, HOP, window=window, return_complex=True).abs().square()[:, 1:, :-1]
    log = F.avg_pool1d(power.mT, 128 // BINS).mT.clamp_min(1e-6).log()
    return (log - log.mean((1, 2), keepdim=True)) / log.std((1, 2), keepdim=True)


def build(adapter: nn.Module, *, qk: int) -> pc.Perceiver:
    """The model: the tokens of a recording to 32 latents, to ten logits."""
    read = partial(pc.CrossAttend, num_heads=8, attention=partial(pc.MultiHeadAttention, qk_dim=qk, v_dim=128))
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(adapter.dim, num_latents=32, dim=128, num_reads=2, depth=2, num_heads=4, cross_attention=read, latent_transformer=process)
    return pc.Perceiver(adapter, encoder, pc.heads.Classification(encoder.dim, num_classes=len(WORDS)))


def raw() -> pc.Perceiver:
    """From 80 tokens of 64 samples."""
    return build(pc.adapters.Audio(64, positions=pc.positions.Fourier(num_axes=1, num_bands=32, max_resolution=80)), qk=256)


def of_spectrogram() -> pc.Perceiver:
    """From 32 x 64 tokens of one value."""
    where = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=(BINS, 32))
    return build(pc.adapters.Spectrogram(positions=where), qk=64)


def moved(samples: Tensor) -> Tensor:
    """Recordings a little earlier or later, softer, some upside down; the noise that leaves comes in again."""
    starts = torch.randint(-200, 201, (len(samples), 1))  # at most: no word may end before it begins
    loud = (torch.rand(len(samples), 1) * 0.7 + 0.3) * (torch.randint(2, (len(samples), 1)) * 2 - 1)
    return loud * samples.gather(1, (starts + torch.arange(LENGTH)) % LENGTH)


def loss(model: nn.Module, words: Words, see: Callable[[Tensor], Tensor], batch: int = 64) -> Tensor:
    """Cross-entropy of recordings drawn at random."""
    chosen = torch.randint(len(words.labels), (batch,))
    return F.cross_entropy(model(see(moved(words.samples[chosen]))), words.labels[chosen], label_smoothing=0.05)


@torch.no_grad()
def answers(model: nn.Module, words: Words, see: Callable[[Tensor], Tensor]) -> Tensor:
    """The number of the word that the model hears in each recording."""
    return torch.cat([model(see(samples)).argmax(-1) for samples in words.samples.split(100)])


def linear(features: Callable[[Tensor], Tensor], seen: Words, unseen: Words) -> Tensor:
    """What logistic regression on features of a recording answers."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    x, test = (features(words.samples).numpy() for words in (seen, unseen))
    return torch.tensor(model.fit(x, seen.labels.numpy()).predict(test))


def draw(words: Words, found: dict[str, Tensor]) -> Any:
    """The spectrogram of each word, and how often each model is right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.2))
    for axes, picture, word in zip(left.subplots(2, 5).flat, spectrogram(words.samples[:10]), WORDS, strict=True):
        axes.imshow(
            picture.numpy(), origin="lower", aspect="auto", cmap="magma", extent=(0, LENGTH / RATE, 0, RATE / 2000)
        )
        axes.set_title(word, fontsize=10)
        axes.label_outer()
    left.supxlabel("seconds", fontsize=9)
    left.supylabel("kHz", fontsize=9)
    axes = right.subplots()
    for row, (name, answer) in enumerate(found.items()):
        right_share = [100 * (answer == words.labels)[words.labels == i].float().mean().item() for i in range(10)]
        axes.scatter(np.arange(10) + 0.12 * (row - 1.5), right_share, s=22, label=name)
    axes.set_xticks(range(10), WORDS)
    axes.set(ylim=(0, 103), ylabel="recognized, % of test recordings")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, compares, draws, and writes the result."""
    run = _run.Run("spoken_digits", __doc__, arguments)
    seen, unseen = generate(TRAIN, 200 if run.toy else 8000), generate(TEST, 100 if run.toy else 1000)
    models = {"Perceiver, raw samples": (raw, nn.Identity()), "Perceiver, spectrogram": (of_spectrogram, spectrogram)}
    found = {
        "logistic regression, mean spectrum": linear(lambda x: spectrogram(x).mean(2), seen, unseen),
        "logistic regression, spectrogram": linear(lambda x: spectrogram(x).flatten(1), seen, unseen),
    }
    for name, (build_one, see) in models.items():
        model = run.train(name, build_one(), partial(loss, words=seen, see=see), steps=3 if run.toy else STEPS)
        found[name] = answers(model, unseen, see)
    right = {name: 100.0 * (answer == unseen.labels) for name, answer in found.items()}
    rows = _run.compare(right, ours="Perceiver, raw samples")
    print(_run.table(rows, "correct, %"))
    sizes = {"train": len(seen.labels), "test": len(unseen.labels), "words": list(WORDS), "chance": 100 / len(WORDS)}
    return run.finish(draw(unseen, found), tables={"correct, %": rows}, data=sizes)


if __name__ == "__main__":
    main()
