"""Random augmentation of knee images and their labels, drawn anew in every training step.

A mirror image of a left knee is a right knee, so every flip takes images with their labels and swaps the labels; the
functions that return no labels do not flip.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def mirror(
    images: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Exchange left and right, which makes knees of the other side."""
    return images.flip(-1), 1 - labels


def flip_vertical(
    images: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Exchange top and bottom; in the axial plane, this too makes knees of the other side."""
    return images.flip(-2), 1 - labels


def rotate_180(
    images: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Rotate by 180 degrees, which is both flips, so the side stays."""
    return flip_vertical(*mirror(images, labels))


def augment(
    images: Float[Tensor, "b 1 h w"], labels: Float[Tensor, " b"], generator: torch.Generator
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, " b"]]:
    """Augment images at random; half of them are mirrored, with their labels swapped.

    Args:
        images: Images in [-1, 1].
        labels: 1 for right, 0 for left.
        generator: Generator on the device of the images; its state alone determines the result.

    Returns:
        New images in [-1, 1], and their labels.
    """
    mirrored, swapped = mirror(images, labels)
    is_mirrored = _uniform(generator, labels, 0, 1) < 0.5
    images = torch.where(is_mirrored[:, None, None, None], mirrored, images)
    labels = torch.where(is_mirrored, swapped, labels)
    height, width = images.shape[-2:]
    affine = random_affine(labels, (height, width), generator)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # Black is 0 from here on, which is also the value of pixels outside of an image.
    moved = F.grid_sample((images + 1) / 2, grid, padding_mode="zeros", align_corners=False)
    exposed = _random_exposure(_random_tones(moved, generator), generator)
    return (exposed * _random_occlusion(exposed, generator)).clamp(0, 1) * 2 - 1, labels


def random_affine(
    like: Float[Tensor, " b"], size: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "b 2 3"]:
    """Draw affine maps: rotations up to 20 degrees, scales of 0.85 to 1.18, shifts up to 10 %, and no reflection.

    Args:
        like: Tensor that gives number, device and dtype.
        size: Height and width of the images, since a rotation in pixels is a shear in [-1, 1] unless they are equal.
        generator: Generator on the device of `like`.
    """
    aspect = size[0] / size[1]
    angle = math.radians(20) * _uniform(generator, like, -1, 1)
    scale = torch.exp(0.165 * _uniform(generator, like, -1, 1))
    c, s = scale * angle.cos(), scale * angle.sin()
    x, y = (0.2 * _uniform(generator, like, -1, 1) for _ in range(2))
    rows = [torch.stack([c, -s * aspect, x], -1), torch.stack([s / aspect, c, y], -1)]
    return torch.stack(rows, dim=1)


def _random_tones(x: Float[Tensor, "b 1 h w"], generator: torch.Generator, knots: int = 7) -> Float[Tensor, "b 1 h w"]:
    """Map the gray levels of about half of the images through a random curve on [0, 1] that is near black at 0.

    The curve need not rise, so fat may become brighter or darker than muscle, as with different scanners and settings.
    """
    curve = _uniform(generator, x[:, 0, 0, :1].expand(-1, knots), 0, 1)
    curve = torch.cat([0.1 * curve[:, :1], curve[:, 1:]], dim=1)
    position = x.clamp(0, 1) * (knots - 1)
    below = position.detach().floor().clamp(max=knots - 2)
    low, high = (curve.gather(1, (below.long() + step).flatten(1)).view_as(x) for step in (0, 1))
    retoned = torch.lerp(low, high, position - below)
    return torch.where(_uniform(generator, x[:, :1, :1, :1], 0, 1) < 0.5, retoned, x)


def _random_exposure(x: Float[Tensor, "b 1 h w"], generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Change contrast, gain, unevenness and noise of images with values in [0, 1]; black stays black."""
    u, v = _axes(x)
    one = x[:, :1, :1, :1]
    gamma = torch.exp(0.4 * _uniform(generator, one, -1, 1))
    gain = torch.exp(0.3 * _uniform(generator, one, -1, 1))
    slope = 0.25 * (_uniform(generator, one, -1, 1) * u + _uniform(generator, one, -1, 1) * v)
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    strength = 0.08 * _uniform(generator, one, 0, 1)
    return x.clamp(min=1e-6) ** gamma * gain * (1 + slope) + strength * noise


def _random_occlusion(x: Float[Tensor, "b 1 h w"], generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Mask that is 0 behind a black wedge at the border (in about half of the images) and a small box, else 1."""
    u, v = _axes(x)
    one = x[:, :1, :1, :1]
    direction = math.pi * _uniform(generator, one, -1, 1)
    wedge = u * direction.cos() + v * direction.sin() < _uniform(generator, one, 0.6, 1.4)
    left, top = (_uniform(generator, one, -1.2, 1) for _ in range(2))
    wide, high = (_uniform(generator, one, 0, 0.4) for _ in range(2))
    box = (u > left) & (u < left + wide) & (v > top) & (v < top + high)
    return (wedge & ~box).to(x.dtype)


def _axes(x: Float[Tensor, "b 1 h w"]) -> tuple[Tensor, Tensor]:
    """Column and row coordinates in [-1, 1], to broadcast over images."""
    u = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
    v = torch.linspace(-1, 1, x.shape[-2], device=x.device, dtype=x.dtype)
    return u, v[:, None]


def _uniform(generator: torch.Generator, like: Tensor, low: float, high: float) -> Tensor:
    """Uniform random numbers from `low` to `high`, one for each entry of `like`."""
    drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return low + (high - low) * drawn


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """Generator whose state depends on all numbers of `key`, each 0 or more, and on nothing else."""
    # The length of the key is included, since a SeedSequence ignores trailing zeros.
    state = int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)
