"""Query module with learned queries."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.queries.selection import select
from perceiver_core.registry import register


@partial(register, name="queries.Learned")
class Learned(nn.Module):
    """Query module that returns `num_queries` learned vectors of width `dim`, the same for all inputs.

    Example:
        >>> source = pc.queries.Learned(2048, dim=768)
        >>> source().shape, source(query_indices=torch.tensor([0, 5])).shape
        (torch.Size([1, 2048, 768]), torch.Size([1, 2, 768]))

    Reference: deepmind-research/perceiver/perceiver.py, `BasicDecoder` with trainable position encodings.
    """

    def __init__(self, num_queries: int, dim: int) -> None:
        super().__init__()
        checks.positive(num_queries=num_queries, dim=dim)
        self.dim = dim
        self.vectors = init.embedding(num_queries, dim)

    def forward(
        self, tokens: object = None, query_indices: Int[Tensor, "*b q"] | None = None
    ) -> Float[Tensor, "#b q e"]:
        """Return all query vectors, or only the vectors at `query_indices`. `tokens` is not used."""
        vectors = self.vectors[None]
        return vectors.clone() if query_indices is None else select(vectors, query_indices)
