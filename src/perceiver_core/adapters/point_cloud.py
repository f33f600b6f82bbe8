"""Adapter for point clouds of any size, and a function that pads point clouds to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.lengths import Lengths, VariableSize, pad
from perceiver_core.argument_errors import checked
from perceiver_core.positions.grid import PointFeatures, check_takes_points
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class PointCloud(VariableSize, nn.Module):
    """Adapter for point clouds `b n axes+f`: one token per point.

    A point consists of its coordinates, followed by its features. A token consists of the features, followed by the
    position encoding of the coordinates.

    Args:
        num_features: Number of features f per point besides the coordinates, such as 3 for a color.
        positions: Position encoding of the coordinates, such as `positions.Fourier`. Coordinates should lie in [-1, 1].

    Example:
        >>> positions = pc.positions.Fourier(num_axes=3, num_bands=64, max_resolution=1120)
        >>> cloud = pc.adapters.PointCloud(num_features=3, positions=positions)
        >>> cloud.dim, cloud(torch.rand(2, 450, 6) * 2 - 1).num_tokens
        (390, 450)

    Reference: Jaegle et al. 2021 (Perceiver), section 4.3.
    """

    length_axes = (-2,)

    def __init__(self, num_features: int = 0, *, positions: PointFeatures) -> None:
        super().__init__()
        if num_features < 0:
            raise ValueError(f"num_features must be at least 0; got {num_features}")
        check_takes_points(positions)
        self.num_features, self.positions = num_features, positions
        self.dim = num_features + positions.dim

    def forward(
        self,
        points: Float[Tensor, "b n f"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert point clouds of any size to tokens.

        Args:
            points: Coordinates and features of the points. To build a batch from clouds of unequal size, use `pad`.
            mask: Mask of valid points, True = attend.
            lengths: Number of points of each cloud before padding, `b`.
        """
        axes = self.positions.num_axes
        checks.is_floating("points", points)
        checks.has_shape("points", points, "b n f", last=axes + self.num_features)
        points, mask = self._with_lengths(points, mask, lengths)
        if mask is not None:
            checks.is_mask("mask", mask, points.shape[:-1])
            points = points.masked_fill(~mask.unsqueeze(-1), 0.0)  # the features of NaN have NaN as gradient
        checks.values("points", points, mask)
        features = self.positions(points[..., :axes]).to(points.dtype)
        return Tokens(torch.cat([points[..., axes:], features], dim=-1), mask=mask)


@checked
def pad_point_clouds(clouds: Sequence[Float[Tensor, "_ f"]]) -> tuple[Float[Tensor, "b n f"], Bool[Tensor, "b n"]]:
    """Zero-pad point clouds to the size of the largest. Return the batch `b n f` and the mask `b n` of valid points.

    Example:
        >>> points, mask = pc.adapters.pad_point_clouds([torch.rand(450, 3), torch.rand(77, 3)])
        >>> points.shape, mask.sum(1).tolist()
        (torch.Size([2, 450, 3]), [450, 77])
    """
    if not clouds:
        raise ValueError("clouds must hold at least one cloud; got none")
    points, mask = pad(clouds, _Rows())
    return points, mask


class _Rows(VariableSize):
    length_axes = (-2,)
