"""Generated clips of a moving shape: video, audio and a label of its movement.

A shape moves in eight frames of 16 x 20 pixels. Each frame has one note: its pitch follows the height of the shape, its
amplitude the horizontal position, and its overtones the type of the shape; contacts with walls and floor click. The
label is one of six movements. Each modality thus carries information on the others, and some of its own: audio does
not depend on the size of the shape.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FRAMES, ROWS, COLUMNS = 8, 16, 20
NOTE = 64  # audio samples per frame
PITCH = (2.5, 9.0)  # periods per note at the bottom and at the top
MOVES = ("fall", "billiard", "swing", "eight", "clockwise", "counterclockwise")
SHAPES = {"disk": (1.0, 0.0, 0.0), "square": (0.8, 0.0, 0.6), "ring": (0.7, 0.7, 0.0)}  # amplitudes of three harmonics
EDGE = 2.5  # least distance between the border and the center of a shape, in pixels
TRAIN, TEST = 0, 1  # first number of the seed of each clip


class Clips(NamedTuple):
    """Videos `n 8 1 16 20` in [0, 1], audio `n 512` in [-1, 1], and the class of each movement `n`."""

    video: Tensor
    audio: Tensor
    label: Tensor


def generate(split: int, count: int) -> Clips:
    """Generate clips of all movements in turn, each with a seed of its own that no other split uses."""
    label = torch.arange(count) % len(MOVES)
    videos, waveforms = zip(
        *(clip(np.random.default_rng([split, i]), MOVES[label[i]]) for i in range(count)), strict=True
    )
    video = torch.tensor(np.stack(videos), dtype=torch.float32)[:, :, None]
    return Clips(video, torch.tensor(np.stack(waveforms), dtype=torch.float32), label)


def clip(rng: np.random.Generator, movement: str) -> tuple[np.ndarray, np.ndarray]:
    """Generate the video and the audio of one clip."""
    height, column, contacts = move(rng, movement, np.arange(FRAMES * NOTE) / (FRAMES * NOTE))
    shape = str(rng.choice(list(SHAPES)))
    video = draw_shape(shape, height[::NOTE], column[::NOTE], rng.uniform(2, 3)) * rng.uniform(0.6, 1)
    return video, play_notes(shape, height[::NOTE], column[::NOTE]) + click_track(contacts)


def move(rng: np.random.Generator, movement: str, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a random path of one of the movements.

    Args:
        rng: Random number generator.
        movement: One of `MOVES`.
        time: Times from 0 to 1.

    Returns:
        Height and column at each time, in [0, 1], and a contact number that changes whenever a wall or the floor is
        touched.
    """
    phase = 2 * np.pi * (rng.uniform() + rng.uniform(0.9, 1.4) * time)
    if movement in ("fall", "billiard"):
        column, wall_contacts = reflect(rng.uniform(), rng.choice([-1, 1]) * rng.uniform(0.5, 1.5) * time)
        if movement == "billiard":
            height, floor_contacts = reflect(rng.uniform(), rng.choice([-1, 1]) * rng.uniform(1.0, 2.2) * time)
            return height, column, wall_contacts + 100 * floor_contacts
        bounce = rng.uniform() + rng.uniform(1.2, 2.2) * time
        return rng.uniform(0.6, 1) * 4 * (bounce % 1) * (1 - bounce % 1), column, wall_contacts + 100 * (bounce // 1)
    size = rng.uniform(0.25, 0.5, 2)
    if movement in ("clockwise", "counterclockwise"):
        size[1] = size[0] * (ROWS - 2 * EDGE) / (COLUMNS - 2 * EDGE)  # width equals height in pixels
    center = rng.uniform(size, 1 - size)
    direction = {"clockwise": 1, "counterclockwise": -1}.get(movement, 0) or rng.choice([-1, 1])
    vertical = {"swing": -np.cos(2 * phase), "eight": np.sin(2 * phase)}.get(movement, np.cos(phase))
    return center[0] + size[0] * vertical, center[1] + size[1] * direction * np.sin(phase), np.zeros(len(time))


def reflect(start: float, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reflect a straight path at 0 and 1.

    Returns:
        Reflected positions, and the number of reflections so far.
    """
    position = start + path
    return 1 - np.abs(position % 2 - 1), position // 1


def draw_shape(shape: str, height: np.ndarray, column: np.ndarray, radius: float) -> np.ndarray:
    """Draw a shape into each frame, with soft edges."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    down = y - (EDGE + (1 - height) * (ROWS - 1 - 2 * EDGE))[:, None, None]
    right = x - (EDGE + column * (COLUMNS - 1 - 2 * EDGE))[:, None, None]
    distance = np.maximum(abs(down), abs(right)) / 0.9 if shape == "square" else np.hypot(down, right)
    inside = np.clip(radius - distance + 0.5, 0, 1)
    return inside * np.clip(distance - radius / 2 + 0.5, 0, 1) if shape == "ring" else inside


def play_notes(shape: str, height: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Synthesize one decaying note per frame."""
    time = np.arange(NOTE) / NOTE
    pitch = PITCH[0] * (PITCH[1] / PITCH[0]) ** height[:, None]
    notes = sum(gain * np.sin(2 * np.pi * k * pitch * time) for k, gain in enumerate(SHAPES[shape], 1))
    return ((0.15 + 0.45 * column[:, None]) * notes * np.exp(-3 * time)).ravel()


def click_track(contacts: np.ndarray) -> np.ndarray:
    """Synthesize a click wherever the contact number changes."""
    hits = (np.diff(contacts, prepend=contacts[:1]) != 0).astype(float)
    return np.convolve(hits, 0.3 * (-0.7) ** np.arange(8))[: len(contacts)]
