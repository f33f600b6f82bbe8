"""Learned positions of a sequence: a vector for every index."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.positions.grid import check_axes
from perceiver_core.registry import register


@register
class LearnedEmbedding(nn.Module):
    """A learned vector for every index along one axis: the first token has the first, whatever the length.

    `LearnedGrid` stretches its array over inputs of other sizes, as a picture wants; this does not, as a sequence that
    grows by one token at a time wants, or a film's frames.

    Args:
        length: how many indices there are.
        dim: the width of a vector.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import LearnedEmbedding
        >>> where = LearnedEmbedding(100, dim=32)
        >>> where(torch.tensor([2, 0, 5])).shape, where.tables((7,), like=torch.zeros(()))[0].shape
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
        """The vectors at these indices, from 0.

        Raises:
            ValueError: indices below 0, or for which there are no vectors; looked at on a CPU, in eager mode.
        """
        checks.below("positions", positions, self.length)
        return F.embedding(positions, self.vectors)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "n p"], ...]:
        """The first vectors: one table.

        Raises:
            ValueError: more places than there are vectors.
        """
        check_axes(grid, self.num_axes)
        if grid[0] > self.length:
            raise ValueError(
                f"there are vectors for at most {self.length} places; got {grid[0]}. Build Indexed with more, or take "
                "Learned, which resamples"
            )
        return (self.vectors[: grid[0]].to(like.dtype),)
