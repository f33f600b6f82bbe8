"""Learned positions: an array over a grid, resampled or cut where the input has another size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.positions.grid import check_axes
from perceiver_core.registry import register

_RESAMPLING = {1: "linear", 2: "bicubic", 3: "trilinear"}


@register
class Learned(nn.Module):
    """A learned vector for every point of a grid of one to three axes.

    An input of another size, square or not, gets the array resampled (linear, bicubic or trilinear, by
    the number of axes), grid ends on grid ends as coordinates are.

    Args:
        grid: the size that the array is stored at, usually the training size.
        dim: the width of a vector.

    Raises:
        ValueError: a grid of no or more than three axes.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import Learned
        >>> where = Learned((14, 14), dim=32)
        >>> where.tables((11, 17), like=torch.zeros(()))[0].shape
        torch.Size([11, 17, 32])

    Reference: deepmind-research/perceiver/position_encoding.py, `TrainablePositionEncoding`.
    """

    def __init__(self, grid: Sequence[int], dim: int) -> None:
        super().__init__()
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid must have one to three axes; got {tuple(grid)}")
        check_axes(grid, len(grid))
        checks.positive(dim=dim)
        self.axes, self.dim = len(grid), dim
        self.vectors = init.embedding(*grid, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "*grid p"], ...]:
        """The array at the size of `grid`: one table."""
        check_axes(grid, self.axes)
        if tuple(grid) == tuple(self.vectors.shape[:-1]):
            return (self.vectors.to(like.dtype),)
        channels_first = torch.movedim(self.vectors, -1, 0)[None]
        resampled = F.interpolate(channels_first, size=tuple(grid), mode=_RESAMPLING[self.axes], align_corners=True)
        return (torch.movedim(resampled[0], 0, -1).to(like.dtype),)


@register
class LearnedUpTo(nn.Module):
    """A learned vector for each place along one axis, up to a largest number of them: frames of a video, say.

    A shorter input gets the first ones, as they are; where `Learned` would resample them all.

    Args:
        most: how many places there are vectors for.
        dim: the width of a vector.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import LearnedUpTo
        >>> LearnedUpTo(8, dim=32).tables((5,), like=torch.zeros(()))[0].shape
        torch.Size([5, 32])

    Reference: open_flamingo and flamingo-pytorch, `PerceiverResampler`.
    """

    def __init__(self, most: int, dim: int) -> None:
        super().__init__()
        checks.positive(most=most, dim=dim)
        self.axes, self.dim = 1, dim
        self.vectors = init.embedding(most, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "n p"], ...]:
        """The first vectors: one table.

        Raises:
            ValueError: more places than there are vectors.
        """
        check_axes(grid, self.axes)
        most = self.vectors.shape[0]
        if grid[0] > most:
            raise ValueError(
                f"there are vectors for at most {most} places; got {grid[0]}. Build LearnedUpTo with more, or take "
                "Learned, which resamples"
            )
        return (self.vectors[: grid[0]].to(like.dtype),)
