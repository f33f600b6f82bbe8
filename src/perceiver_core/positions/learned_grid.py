"""Learned positions of a grid: an array that is resampled for inputs of another size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.positions.grid import check_axes
from perceiver_core.registry import register

_RESAMPLING = {1: "linear", 2: "bicubic", 3: "trilinear"}


@register
class LearnedGrid(nn.Module):
    """A learned vector for every point of a grid of one to three axes.

    For inputs of another size the array is resampled (linear, bicubic or trilinear, by the number of axes), with
    grid ends aligned as coordinates are.

    Args:
        grid: Size of the array, usually the size in training.
        dim: Width of a vector.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import LearnedGrid
        >>> LearnedGrid((14, 14), dim=32).tables((11, 17), like=torch.zeros(()))[0].shape
        torch.Size([11, 17, 32])

    Reference: deepmind-research/perceiver/position_encoding.py, `TrainablePositionEncoding`.
    """

    def __init__(self, grid: Sequence[int], dim: int) -> None:
        super().__init__()
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid must have one to three axes; got {tuple(grid)}")
        check_axes(grid, len(grid))
        checks.positive(dim=dim)
        self.num_axes, self.dim = len(grid), dim
        self.vectors = init.embedding(*grid, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "*grid p"], ...]:
        """Return one table: the learned array, resampled to the size of `grid`."""
        return (self(grid, like),)

    def forward(self, grid: Sequence[int], like: Tensor) -> Float[Tensor, "*grid p"]:
        """Return the learned array, resampled to the size of `grid`, in the dtype of `like`."""
        check_axes(grid, self.num_axes)
        if tuple(grid) == tuple(self.vectors.shape[:-1]):
            return self.vectors.to(like.dtype, copy=True)  # no module returns its own parameter
        channels_first = torch.movedim(self.vectors, -1, 0)[None]
        resampled = F.interpolate(channels_first, size=tuple(grid), mode=_RESAMPLING[self.num_axes], align_corners=True)
        return torch.movedim(resampled[0], 0, -1).to(like.dtype)
