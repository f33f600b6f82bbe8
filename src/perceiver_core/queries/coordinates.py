"""Queries at any coordinates, not only on a grid."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.queries.choose import check_takes_points
from perceiver_core.registry import register


@register
class Coordinates(nn.Module):
    """The features of points in [-1, 1] that are given with each call.

    Args:
        positions: `positions.Fourier`, or anything with `axes` and `dim` that maps points `*b axes` to features.

    Example:
        >>> import torch
        >>> from perceiver_core import positions, queries
        >>> ask = queries.Coordinates(positions.Fourier(num_axes=2, num_bands=8))
        >>> ask(points=torch.rand(3, 100, 2) * 2 - 1).shape
        torch.Size([3, 100, 34])
    """

    def __init__(self, positions: Any) -> None:
        super().__init__()
        check_takes_points(positions)
        self.positions = positions

    @property
    def dim(self) -> int:
        """The width of a query."""
        return int(self.positions.dim)

    def forward(self, tokens: Any = None, *, points: Float[Tensor, "*b q axes"] | None = None) -> Float[Tensor, "#b q e"]:
        """The features of the points `points`, `q axes` or `b q axes`."""
        if points is None:
            raise ValueError("points must be points in [-1, 1], q axes or b q axes; Coordinates has none of its own")
        checks.is_floating("points", points)
        if points.ndim not in (2, 3) or points.shape[-1] != self.positions.num_axes:
            raise ValueError(f"points must be q {self.positions.num_axes} or b q {self.positions.num_axes}; got {tuple(points.shape)}")
        features: Tensor = self.positions(points)
        return features[None] if points.ndim == 2 else features
