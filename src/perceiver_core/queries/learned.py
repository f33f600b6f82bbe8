"""Learned queries: one vector for each answer."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.queries.choose import chosen
from perceiver_core.registry import register


@partial(register, name="queries.Learned")
class Learned(nn.Module):
    """As many learned vectors as there are answers.

    Args:
        num_queries: how many.
        dim: their width.

    Example:
        >>> import torch
        >>> from perceiver_core import queries
        >>> ask = queries.Learned(2048, dim=768)
        >>> ask().shape, ask(query_indices=torch.tensor([0, 5])).shape
        (torch.Size([1, 2048, 768]), torch.Size([1, 2, 768]))

    Reference: deepmind-research/perceiver/perceiver.py, `BasicDecoder` with trainable position encodings.
    """

    def __init__(self, num_queries: int, dim: int) -> None:
        super().__init__()
        checks.positive(num_queries=num_queries, dim=dim)
        self.dim = dim
        self.vectors = init.embedding(num_queries, dim)

    def forward(self, tokens: Any = None, *, query_indices: Int[Tensor, "*b q"] | None = None) -> Float[Tensor, "#b q e"]:
        """The vectors; `tokens` do not matter."""
        return self.vectors[None] if query_indices is None else chosen(self.vectors[None], query_indices)
