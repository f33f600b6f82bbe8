"""Random position encodings of grids and points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perceiver_core import positions
from tests.robustness.composition_draws import Draw


def draw_positions(draw: Draw, num_axes: int, grid: Sequence[int], *, depth: int = 0) -> Any:
    """Draw a position encoding for a grid, or None."""
    kinds = ["fourier", "per_axis", "nerf", "gaussian"] + ["none"] * (not depth)
    kinds += ["embedding"] * (num_axes == 1) + ["learned"] * (num_axes <= 3) + ["projected", "fixed"] * (depth < 2)
    kind = draw.choice(*kinds)
    if kind == "embedding":
        return draw.make(positions.LearnedEmbedding, grid[0] + draw.size(0, 3), draw.size(1, 6))
    if kind == "learned":
        size = tuple(grid) if draw.flag() else tuple(draw.size(1, 5) for _ in grid)
        return draw.make(positions.LearnedGrid, size, draw.size(1, 6))
    if kind == "projected":
        inner = draw_positions(draw, num_axes, grid, depth=depth + 1)
        return draw.make(positions.Projected, inner, draw.size(1, 6))
    if kind == "fixed":
        full = tuple(size + draw.size(0, 3) for size in grid)
        inner = draw_positions(draw, num_axes, full, depth=depth + 1)
        fixed = tuple(None if draw.flag(0.2) else size for size in full)
        return draw.make(positions.FixedGrid, inner, fixed)
    return None if kind == "none" else draw_point_features(draw, num_axes, kind)


def draw_point_features(draw: Draw, num_axes: int, kind: str = "") -> Any:
    """Draw a position encoding that can be called with points."""
    kind = kind or draw.choice("fourier", "per_axis", "nerf", "gaussian")
    if kind == "gaussian":
        return draw.make(positions.Gaussian, num_axes, draw.size(1, 4), scale=draw.choice(0.5, 2.0))
    if kind == "per_axis":
        return draw.make(positions.FourierPerAxis, num_axes, draw.size(1, 3), max_frequency=draw.choice(3.0, 10.0))
    if kind == "nerf":
        return draw.make(positions.NeRF, num_axes, draw.size(1, 3))
    most = draw.choice(1, 7, 13.0, tuple(draw.choice(5, 11) for _ in range(num_axes)))
    concat, sine = draw.flag(), draw.flag()
    return draw.make(
        positions.Fourier, num_axes, draw.size(1, 3), max_resolution=most, concat_positions=concat, sine_only=sine
    )
