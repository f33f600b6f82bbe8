"""Learned positions of a sequence: a vector for every index."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.registry import register


@register
class Indexed(nn.Module):
    """A learned vector for every index of a sequence: the first token has the first, whatever the length.

    `Learned` stretches its array over inputs of other sizes, as a picture wants; this does not, as a sequence that
    grows by one token at a time wants.

    Args:
        length: how many indices there are.
        dim: the width of a vector.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import Indexed
        >>> Indexed(100, dim=32)(torch.arange(7)).shape
        torch.Size([7, 32])

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `position_embeddings` of the style "random".
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        checks.positive(length=length, dim=dim)
        self.length, self.dim = length, dim
        self.vectors = init.embedding(length, dim)

    def forward(self, positions: Int[Tensor, "*b n"]) -> Float[Tensor, "*b n d"]:
        """The vectors at these indices, from 0."""
        return F.embedding(positions, self.vectors)
