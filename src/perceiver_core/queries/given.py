"""Queries that come with each call."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register


@register
class Given(nn.Module):
    """What is given with each call, as it is.

    Args:
        dim: the width of a query.

    Example:
        >>> import torch
        >>> from perceiver_core import queries
        >>> ask = queries.Given(32)
        >>> ask(at=torch.randn(100, 32)).shape, ask(at=torch.randn(2, 100, 32)).shape
        (torch.Size([1, 100, 32]), torch.Size([2, 100, 32]))
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.dim = dim

    def forward(self, tokens: Any = None, *, at: Float[Tensor, "*b q e"] | None = None) -> Float[Tensor, "#b q e"]:
        """The queries `at`, `q e` for all samples or `b q e`; `tokens` do not matter."""
        if at is None:
            raise ValueError(f"at must be the queries, q {self.dim} or b q {self.dim}; Given has none of its own")
        checks.is_floating("at", at)
        if at.ndim not in (2, 3) or at.shape[-1] != self.dim:
            raise ValueError(f"at must be q {self.dim} or b q {self.dim}; got shape {tuple(at.shape)}")
        return at[None] if at.ndim == 2 else at
