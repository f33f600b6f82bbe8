"""Recordings of spoken words: generated speech, and a reader of the Free Spoken Digit Dataset.

A generated word is a sequence of sounds; a sound is two resonances (formants) of a voiced source, or hiss. Three pairs
of words have the same sounds in another order, so an average over time cannot distinguish them.
"""

from __future__ import annotations

import io
import re
import wave
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RATE = 8000  # samples a second
LENGTH = 5120  # samples of a generated recording, 0.64 s
NOISE = (-1.0, 0.0)  # range of log10 of the deviation of the noise, where the peak of the word is 1
TRAIN, TEST = 0, 1  # first number of the seed of each generated recording

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


@dataclass(frozen=True)
class Speech:
    """Recordings of unequal length, zero-padded to a batch.

    Args:
        samples: Waveforms `n samples` in [-1, 1].
        lengths: Number of samples of each recording.
        labels: Word of each recording, 0 to 9.
        speakers: Name of each speaker; empty if there are none.
        indices: Number of each recording among those of its speaker and word.
    """

    samples: Tensor
    lengths: Tensor
    labels: Tensor
    speakers: tuple[str, ...] = ()
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Speech:
        """Return the recordings with these indices, padded to the longest of them."""
        lengths = self.lengths[chosen]
        speakers = tuple(self.speakers[i] for i in chosen.tolist()) if self.speakers else ()
        indices = None if self.indices is None else self.indices[chosen]
        return Speech(self.samples[chosen, : int(lengths.max())], lengths, self.labels[chosen], speakers, indices)


class Split(NamedTuple):
    """Indices of the recordings for training and for the test."""

    train: Tensor
    test: Tensor


def splits(speech: Speech) -> dict[str, Split]:
    """Split by index, with 0 to 4 as the test set, and by speaker, with each speaker once as the test set."""
    assert speech.indices is not None
    tests = {"by index": speech.indices < 5}
    names = sorted(set(speech.speakers))
    if len(names) > 1:
        tests |= {f"without {name}": torch.tensor([name == other for other in speech.speakers]) for name in names}
    return {name: Split((~test).nonzero()[:, 0], test.nonzero()[:, 0]) for name, test in tests.items()}


def read(path: Path) -> Speech:
    """Read recordings `{digit}_{speaker}_{index}.wav` (8 kHz, 16 bit, mono) in a folder or a zip file.

    Raises:
        ValueError: If there are no recordings, or a file has another name or another format.
    """
    found = [(name, *_parse(name), _samples(name, content)) for name, content in _wav_files(path)]
    if not found:
        raise ValueError(f"{path} must hold files {{digit}}_{{speaker}}_{{index}}.wav; found no .wav file")
    _, digits, speakers, indices, waveforms = zip(*sorted(found, key=lambda row: row[1:4]), strict=True)
    lengths = torch.tensor([len(x) for x in waveforms])
    samples = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in waveforms], batch_first=True)
    return Speech(samples, lengths, torch.tensor(digits), tuple(speakers), torch.tensor(indices))


def _wav_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of all WAV files in a folder or a zip file, at any depth."""
    if path.is_dir():
        yield from ((str(file), file.read_bytes()) for file in path.rglob("*.wav"))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from ((f"{path}: {name}", archive.read(name)) for name in archive.namelist() if name.endswith(".wav"))
    else:
        raise ValueError(f"{path} must be a folder or a zip file of recordings")


def _parse(name: str) -> tuple[int, str, int]:
    """Return digit, speaker and index from the name of a file."""
    match = re.search(r"(?:^|[/\\ ])(\d)_([^_/\\]+)_(\d+)\.wav$", name)
    if match is None:
        raise ValueError(f"{name} must be named {{digit}}_{{speaker}}_{{index}}.wav, such as 7_jackson_32.wav")
    return int(match[1]), match[2], int(match[3])


def _samples(name: str, content: bytes) -> np.ndarray:
    """Decode a WAV file to samples in [-1, 1)."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            actual = (file.getframerate(), 8 * file.getsampwidth(), file.getnchannels())
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name} is not a WAV file with PCM samples: {error}") from error
    if actual != (RATE, 16, 1):
        raise ValueError(f"{name} must have {RATE} Hz, 16 bit, 1 channel; got {actual[0]}, {actual[1]}, {actual[2]}")
    if not data:
        raise ValueError(f"{name} has no samples")
    return np.frombuffer(data, "<i2").astype(np.float32) / 2**15


def generate(num_train: int, num_test: int) -> tuple[Speech, dict[str, Split]]:
    """Generate recordings of all words in turn, each with a seed of its own, and split them."""
    seeds = [*([TRAIN, i] for i in range(num_train)), *([TEST, i] for i in range(num_test))]
    labels = torch.tensor([i % len(WORDS) for _, i in seeds])
    spoken = [synthesize(np.random.default_rng(seed), WORDS[word]) for seed, word in zip(seeds, labels, strict=True)]
    speech = Speech(torch.tensor(np.stack(spoken)), torch.full((len(labels),), LENGTH), labels)
    return speech, {"generated": Split(torch.arange(num_train), torch.arange(num_train, len(labels)))}


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
