"""Queries at any coordinates, not only those of a grid."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions.points import PointFeatures, check_takes_points
from perceiver_core.registry import register


@register
class Coordinates(nn.Module):
    """Queries that are the position features of points, which are passed with each call.

    Args:
        positions: Position features of points, such as `positions.Fourier`: a callable from points `*b axes` to
            features, with `num_axes` and `dim`.

    Example:
        >>> import torch
        >>> from perceiver_core import positions, queries
        >>> source = queries.Coordinates(positions.Fourier(num_axes=2, num_bands=8))
        >>> source(points=torch.rand(3, 100, 2) * 2 - 1).shape
        torch.Size([3, 100, 34])
    """

    def __init__(self, positions: PointFeatures) -> None:
        super().__init__()
        check_takes_points(positions)
        self.positions, self.dim = positions, int(positions.dim)

    def forward(
        self, tokens: object = None, points: Float[Tensor, "*b q axes"] | None = None
    ) -> Float[Tensor, "#b q e"]:
        """Return the features of points in [-1, 1], `q axes` for all samples or `b q axes`; `tokens` are not used."""
        if points is None:
            raise ValueError("points must be points in [-1, 1], q axes or b q axes; Coordinates has none of its own")
        checks.is_floating("points", points)
        axes = self.positions.num_axes
        if points.ndim not in (2, 3) or points.shape[-1] != axes:
            raise ValueError(f"points must be q {axes} or b q {axes}; got {tuple(points.shape)}")
        features = self.positions(points)
        return features[None] if points.ndim == 2 else features
