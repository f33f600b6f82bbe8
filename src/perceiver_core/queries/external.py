"""Queries that are passed with each call."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register


@register
class External(nn.Module):
    """Queries that are passed with each call and returned unchanged.

    Args:
        dim: Width of a query.

    Example:
        >>> import torch
        >>> from perceiver_core import queries
        >>> source = queries.External(32)
        >>> source(queries=torch.randn(100, 32)).shape, source(queries=torch.randn(2, 100, 32)).shape
        (torch.Size([1, 100, 32]), torch.Size([2, 100, 32]))
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.dim = dim

    def forward(self, tokens: object = None, queries: Float[Tensor, "*b q e"] | None = None) -> Float[Tensor, "#b q e"]:
        """Return the queries, `q e` for all samples or `b q e`; `tokens` are not used."""
        if queries is None:
            raise ValueError(f"queries must be q {self.dim} or b q {self.dim}; got None. Pass them with each call")
        checks.is_floating("queries", queries)
        if queries.ndim not in (2, 3) or queries.shape[-1] != self.dim:
            raise ValueError(f"queries must be q {self.dim} or b q {self.dim}; got shape {tuple(queries.shape)}")
        return queries[None] if queries.ndim == 2 else queries
