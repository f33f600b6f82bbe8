"""Drawing of shapes given in millimeters into an image of pixels, independent of anatomy.

A shape is a signed distance to its edge, negative inside, so that shapes can be united, shrunk and softened by
arithmetic. Rotation, scale and shift are applied once, to the grid on which the distances are computed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

WIDTH, HEIGHT = 260, 228
MM_PER_PIXEL = 0.55


def smooth_step(level: float, start: float, end: float) -> float:
    """Smooth step: 0 up to `start`, 1 from `end` on."""
    s = min(max((level - start) / (end - start), 0.0), 1.0)
    return s * s * (3 - 2 * s)


def mix(start: float, end: float, share: float) -> float:
    """Linear interpolation from `start` to `end`."""
    return start + (end - start) * share


def ellipse(x: Floats, y: Floats, center: tuple[float, float], axes: tuple[float, float], turn: float = 0.0) -> Floats:
    """Signed distance to an ellipse in mm, negative inside; exact on its edge alone."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    dx, dy = x - np.float32(center[0]), y - np.float32(center[1])
    p = (dx * np.float32(c / axes[0])) + (dy * np.float32(s / axes[0]))
    q = (dy * np.float32(c / axes[1])) - (dx * np.float32(s / axes[1]))
    return (np.sqrt(p * p + q * q) - np.float32(1)) * np.float32(min(axes))


def smooth_union(first: Floats, second: Floats, blend: float) -> Floats:
    """Union of two signed distances, with inner corners rounded over `blend` mm."""
    near = np.maximum(np.float32(blend) - np.abs(first - second), np.float32(0))
    return np.minimum(first, second) - near * near * np.float32(0.25 / blend)


class Canvas:
    """Brightness image of a limb, on a grid in millimeters of the limb.

    Painting touches only a window around each shape, so that a slice takes a few milliseconds.

    Attributes:
        values: Brightness, `HEIGHT x WIDTH`.
        x: Horizontal coordinates of the limb, of the same shape.
        y: Vertical coordinates of the limb, of the same shape.
        u: Horizontal coordinates of the image, `1 x WIDTH`, in mm.
        v: Vertical coordinates of the image, `HEIGHT x 1`, in mm.

    Args:
        scale: Scale along the axes of the limb.
        shift: Shift in mm.
        turn: Rotation in degrees.
    """

    def __init__(self, scale: tuple[float, float], shift: tuple[float, float], turn: float) -> None:
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
        """Rows and columns that contain the disk of `radius` mm around `center`."""
        x, y = center[0] * self.scale[0], center[1] * self.scale[1]
        u = x * self.cos - y * self.sin + self.shift[0]
        v = x * self.sin + y * self.cos + self.shift[1]
        reach = radius * max(self.scale) / MM_PER_PIXEL + 2
        column, row = u / MM_PER_PIXEL + (WIDTH - 1) / 2, v / MM_PER_PIXEL + (HEIGHT - 1) / 2
        rows = slice(max(int(row - reach), 0), max(int(row + reach) + 1, 0))
        return rows, slice(max(int(column - reach), 0), max(int(column + reach) + 1, 0))

    def fill(self, window: tuple[slice, slice], distance: Floats, value: float | Floats) -> None:
        """Paint `value` where `distance` is negative, with an edge about a millimeter wide."""
        cover = np.clip(np.float32(0.5) - distance, np.float32(0), np.float32(1))
        part = self.values[window]
        part += (np.asarray(value, dtype=np.float32) - part) * cover

    def ellipse(
        self,
        center: tuple[float, float],
        axes: tuple[float, float],
        value: float,
        *,
        turn: float = 0.0,
        outline: float | None = None,
    ) -> None:
        """Paint an ellipse.

        Args:
            center: Center in mm.
            axes: Half axes in mm; nothing is painted if one is below 0.5.
            value: Brightness.
            turn: Rotation in degrees.
            outline: Brightness of a sheath around the ellipse; None for none.
        """
        if min(axes) < 0.5:
            return
        window = self.window(center, max(axes) + 2)
        distance = ellipse(self.x[window], self.y[window], center, axes, turn)
        if outline is not None:
            self.fill(window, distance - np.float32(0.9), outline)
        self.fill(window, distance, value)
