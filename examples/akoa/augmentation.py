"""Other pictures of the same knees, drawn anew for every step of training.

A mirror image of a left knee is a right knee. Whatever reflects a picture here takes the labels along
and swaps them; whatever does not swap them does not reflect.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def mirror(
    pictures: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Left and right exchanged: knees of the other side."""
    return pictures.flip(-1), 1 - labels


def upend(
    pictures: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Top and bottom exchanged: the plane is axial, so these too are knees of the other side."""
    return pictures.flip(-2), 1 - labels


def half_turn(
    pictures: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Turned by 180 degrees, which is both flips: the same knees."""
    return upend(*mirror(pictures, labels))


def augment(
    pictures: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"], generator: torch.Generator
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Other pictures of the same knees, half of them mirrored with their labels swapped.

    Args:
        pictures: in [-1, 1].
        labels: 1 right, 0 left.
        generator: on the device of the pictures; its state alone decides what is drawn.

    Returns:
        New pictures in [-1, 1], and their labels.
    """
    mirrored, swapped = mirror(pictures, labels)
    chosen = _draw(generator, labels, 0, 1) < 0.5
    pictures = torch.where(chosen[:, None, None, None], mirrored, pictures)
    labels = torch.where(chosen, swapped, labels)
    height, width = pictures.shape[-2:]
    motion = draw_motion(labels, (height, width), generator)
    grid = F.affine_grid(motion, list(pictures.shape), align_corners=False)
    # From here on black is 0, which is also what comes in from outside of a picture.
    moved = F.grid_sample((pictures + 1) / 2, grid, padding_mode="zeros", align_corners=False)
    exposed = _expose(_retone(moved, generator), generator)
    return (exposed * _visible(exposed, generator)).clamp(0, 1) * 2 - 1, labels


def draw_motion(like: Float[Tensor, " b"], size: tuple[int, int], generator: torch.Generator) -> Float[Tensor, "b 2 3"]:
    """Rotations to +-20 degrees, scales of 0.85 to 1.18, shifts to 10 %: never a reflection.

    Args:
        like: gives number, device and dtype.
        size: height and width of the pictures; a turn in pixels is a shear in [-1, 1] unless they are equal.
        generator: of the device of `like`.
    """
    aspect = size[0] / size[1]
    angle = math.radians(20) * _draw(generator, like, -1, 1)
    scale = torch.exp(0.165 * _draw(generator, like, -1, 1))
    c, s = scale * angle.cos(), scale * angle.sin()
    x, y = (0.2 * _draw(generator, like, -1, 1) for _ in range(2))
    rows = [torch.stack([c, -s * aspect, x], -1), torch.stack([s / aspect, c, y], -1)]
    return torch.stack(rows, dim=1)


def _retone(x: Float[Tensor, "b 1 h w"], generator: torch.Generator, knots: int = 7) -> Float[Tensor, "b 1 h w"]:
    """Every other picture in grays of its own: values in [0, 1] through a random curve, near black at 0.

    The curve need not rise, so fat may be brighter than muscle or darker, as scanners and settings have it.
    """
    curve = _draw(generator, x[:, 0, 0, :1].expand(-1, knots), 0, 1)
    curve = torch.cat([0.1 * curve[:, :1], curve[:, 1:]], dim=1)
    place = x.clamp(0, 1) * (knots - 1)
    below = place.detach().floor().clamp(max=knots - 2)
    low, high = (curve.gather(1, (below.long() + step).flatten(1)).view_as(x) for step in (0, 1))
    retoned = torch.lerp(low, high, place - below)
    return torch.where(_draw(generator, x[:, :1, :1, :1], 0, 1) < 0.5, retoned, x)


def _expose(x: Float[Tensor, "b 1 h w"], generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Another contrast, gain, slope of the field and noise; values in [0, 1], where black stays black."""
    u, v = _axes(x)
    one = x[:, :1, :1, :1]
    gamma = torch.exp(0.4 * _draw(generator, one, -1, 1))
    gain = torch.exp(0.3 * _draw(generator, one, -1, 1))
    slope = 0.25 * (_draw(generator, one, -1, 1) * u + _draw(generator, one, -1, 1) * v)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    strength = 0.08 * _draw(generator, one, 0, 1)
    shown: Tensor = x.clamp(min=1e-6) ** gamma * gain * (1 + slope) + strength * noise
    return shown


def _visible(x: Float[Tensor, "b 1 h w"], generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """1 where a picture is seen, 0 behind a black wedge at the border (every other) and a small box."""
    u, v = _axes(x)
    one = x[:, :1, :1, :1]
    direction = math.pi * _draw(generator, one, -1, 1)
    wedge = u * direction.cos() + v * direction.sin() < _draw(generator, one, 0.6, 1.4)
    left, top = (_draw(generator, one, -1.2, 1) for _ in range(2))
    wide, high = (_draw(generator, one, 0, 0.4) for _ in range(2))
    box = (u > left) & (u < left + wide) & (v > top) & (v < top + high)
    return (wedge & ~box).to(x.dtype)


def _axes(x: Float[Tensor, "b 1 h w"]) -> tuple[Tensor, Tensor]:
    """Columns and rows in [-1, 1], to broadcast over pictures."""
    u = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
    v = torch.linspace(-1, 1, x.shape[-2], device=x.device, dtype=x.dtype)
    return u, v[:, None]


def _draw(generator: torch.Generator, like: Tensor, low: float, high: float) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return low + (high - low) * drawn


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose draws depend on all of the numbers of `key`, each 0 or more, and nothing else."""
    # Its length goes in too: a SeedSequence does not see zeros at the end.
    state = int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)
