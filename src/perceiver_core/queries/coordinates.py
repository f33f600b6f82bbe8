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
        >>> ask = queries.Coordinates(positions.Fourier(axes=2, bands=8))
        >>> ask(at=torch.rand(3, 100, 2) * 2 - 1).shape
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

    def forward(self, tokens: Any = None, *, at: Float[Tensor, "*b q axes"] | None = None) -> Float[Tensor, "#b q e"]:
        """The features of the points `at`, `q axes` or `b q axes`."""
        if at is None:
            raise ValueError("at must be points in [-1, 1], q axes or b q axes; Coordinates has none of its own")
        checks.is_floating("at", at)
        if at.ndim not in (2, 3) or at.shape[-1] != self.positions.axes:
            raise ValueError(f"at must be q {self.positions.axes} or b q {self.positions.axes}; got {tuple(at.shape)}")
        features: Tensor = self.positions(at)
        return features[None] if at.ndim == 2 else features
