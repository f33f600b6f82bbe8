"""Queries that are the input's own tokens: an answer for each of them."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.queries.choose import chosen
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class FromInputs(nn.Module):
    """The tokens written out, content and positions.

    Args:
        dim: the width of a token, the adapter's `.dim`.

    Example:
        >>> import torch
        >>> from perceiver_core import Tokens, queries
        >>> queries.FromInputs(3)(Tokens(torch.randn(2, 5, 7, 3))).shape
        torch.Size([2, 35, 3])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 (optical flow).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.dim = dim

    def grid_of(self, tokens: Tokens | Tensor) -> tuple[int, ...] | None:
        """The grid of the tokens."""
        return tuple(tokens.grid) if isinstance(tokens, Tokens) else None

    def forward(
        self, tokens: Tokens | Float[Tensor, "b n c"], *, query_indices: Int[Tensor, "*b q"] | None = None
    ) -> Float[Tensor, "b q e"]:
        """One query a token."""
        dense = tokens.materialize() if isinstance(tokens, Tokens) else tokens
        checks.has_shape("tokens", dense, "b n c", last=self.dim)
        return dense if query_indices is None else chosen(dense, query_indices)
