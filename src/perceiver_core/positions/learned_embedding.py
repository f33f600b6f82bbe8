"""Learned positions of a sequence: one vector per index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.positions.grid import check_axes
from perceiver_core.registry import register


@register
class LearnedEmbedding(nn.Module):
    """A learned vector for every index along one axis; token i has vector i, whatever the length of the input.

    It suits sequences that grow by one token at a time, and frames of a video. `LearnedGrid` instead resamples its
    array for inputs of other sizes, which suits images.

    Args:
        length: Number of indices.
        dim: Width of a vector.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import LearnedEmbedding
        >>> positions = LearnedEmbedding(100, dim=32)
        >>> positions(torch.tensor([2, 0, 5])).shape, positions.tables((7,), like=torch.zeros(()))[0].shape
        (torch.Size([3, 32]), torch.Size([7, 32]))

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `position_embeddings` of the style "random";
    open_flamingo and flamingo-pytorch, `PerceiverResampler`.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        checks.positive(length=length, dim=dim)
        self.num_axes, self.length, self.dim = 1, length, dim
        self.vectors = init.embedding(length, dim)

    def forward(self, positions: Int[Tensor, "*b n"]) -> Float[Tensor, "*b n d"]:
        """Return the vectors at these indices, which are checked to be in range on a CPU, in eager mode."""
        checks.below("positions", positions, self.length)
        return F.embedding(positions, self.vectors)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "n p"], ...]:
        """Return one table, the vectors of the first indices; raise ValueError if there are too few."""
        check_axes(grid, self.num_axes)
        if grid[0] > self.length:
            raise ValueError(
                f"grid must have at most length={self.length} tokens; got {grid[0]}. Build LearnedEmbedding with a "
                "larger length, or use LearnedGrid, which resamples"
            )
        return (self(torch.arange(grid[0], device=like.device)).to(like.dtype),)
