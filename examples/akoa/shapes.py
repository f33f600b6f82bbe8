"""Painting shapes given in millimeters into a picture of pixels; knows nothing of knees.

A shape is a signed distance to its edge, negative inside, so that shapes join, shrink and soften by
arithmetic. Turning, scaling and shifting happen once, to the grid the distances are computed on.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

WIDTH, HEIGHT = 260, 228
MM_PER_PIXEL = 0.55


def smooth_step(level: float, start: float, end: float) -> float:
    """A smooth step: 0 up to `start`, 1 from `end` on."""
    s = min(max((level - start) / (end - start), 0.0), 1.0)
    return s * s * (3 - 2 * s)


def mix(start: float, end: float, share: float) -> float:
    """The number that lies `share` of the way from `start` to `end`."""
    return start + (end - start) * share


def ellipse(x: Floats, y: Floats, center: tuple[float, float], axes: tuple[float, float], turn: float = 0.0) -> Floats:
    """Signed distance to an ellipse in mm, negative inside; exact on its edge alone."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    dx, dy = x - np.float32(center[0]), y - np.float32(center[1])
    p = (dx * np.float32(c / axes[0])) + (dy * np.float32(s / axes[0]))
    q = (dy * np.float32(c / axes[1])) - (dx * np.float32(s / axes[1]))
    distance: Floats = (np.sqrt(p * p + q * q) - np.float32(1)) * np.float32(min(axes))
    return distance


def join(first: Floats, second: Floats, blend: float) -> Floats:
    """The union of two signed distances, its inner corner rounded over `blend` mm."""
    near = np.maximum(np.float32(blend) - np.abs(first - second), np.float32(0))
    joined: Floats = np.minimum(first, second) - near * near * np.float32(0.25 / blend)
    return joined


class Canvas:
    """A limb being painted: brightness on a grid whose x and y are millimeters of the limb.

    `values`, `x` and `y` are `HEIGHT x WIDTH`; `u` and `v` are millimeters of the picture. Painting
    touches only a window around each shape, which is what keeps a slice at a few milliseconds.
    """

    def __init__(self, scale: tuple[float, float], shift: tuple[float, float], turn: float) -> None:
        """An empty canvas for a limb scaled along its own axes, turned by degrees, moved by mm."""
        self.scale, self.shift = scale, shift
        angle = math.radians(turn)
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.u = (np.arange(WIDTH, dtype=np.float32) - (WIDTH - 1) / 2)[None] * MM_PER_PIXEL
        self.v = (np.arange(HEIGHT, dtype=np.float32) - (HEIGHT - 1) / 2)[:, None] * MM_PER_PIXEL
        du, dv = self.u - self.shift[0], self.v - self.shift[1]
        self.x: Floats = (du * self.cos + dv * self.sin) / np.float32(self.scale[0])
        self.y: Floats = (dv * self.cos - du * self.sin) / np.float32(self.scale[1])
        self.values: Floats = np.full((HEIGHT, WIDTH), 0.02, dtype=np.float32)

    def window(self, center: tuple[float, float], radius: float) -> tuple[slice, slice]:
        """Rows and columns that hold the disk of `radius` mm around `center`."""
        x, y = center[0] * self.scale[0], center[1] * self.scale[1]
        u = x * self.cos - y * self.sin + self.shift[0]
        v = x * self.sin + y * self.cos + self.shift[1]
        reach = radius * max(self.scale) / MM_PER_PIXEL + 2
        column, row = u / MM_PER_PIXEL + (WIDTH - 1) / 2, v / MM_PER_PIXEL + (HEIGHT - 1) / 2
        rows = slice(max(int(row - reach), 0), max(int(row + reach) + 1, 0))
        return rows, slice(max(int(column - reach), 0), max(int(column + reach) + 1, 0))

    def fill(self, where: tuple[slice, slice], distance: Floats, value: float | Floats) -> None:
        """Paint `value` where `distance` is negative, with an edge about a millimeter soft."""
        cover = np.clip(np.float32(0.5) - distance, np.float32(0), np.float32(1))
        part = self.values[where]
        part += (np.asarray(value, dtype=np.float32) - part) * cover

    def ellipse(
        self,
        center: tuple[float, float],
        axes: tuple[float, float],
        value: float,
        *,
        turn: float = 0.0,
        seam: float | None = None,
    ) -> None:
        """An ellipse of half axes in mm; `seam` is the brightness of a sheath around it."""
        if min(axes) < 0.5:
            return
        where = self.window(center, max(axes) + 2)
        distance = ellipse(self.x[where], self.y[where], center, axes, turn)
        if seam is not None:
            self.fill(where, distance - np.float32(0.9), seam)
        self.fill(where, distance, value)
