"""Query module that uses the input tokens as queries."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.queries.selection import select
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class FromInputs(nn.Module):
    """Query module that returns the input tokens, including their position encodings, as queries.

    `dim` is the token width, equal to the attribute `dim` of the adapter.

    Example:
        >>> pc.queries.FromInputs(3)(pc.Tokens(torch.randn(2, 5, 7, 3))).shape
        torch.Size([2, 35, 3])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 (optical flow).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.dim = dim

    def grid_of(self, tokens: object) -> tuple[int, ...] | None:
        """Return the grid size of the tokens, or None if they are a plain tensor."""
        return tokens.grid if isinstance(tokens, Tokens) else None

    def forward(
        self, tokens: Tokens | Float[Tensor, "b n c"], query_indices: Int[Tensor, "*b q"] | None = None
    ) -> Float[Tensor, "b q e"]:
        """Return one query per token, or only the queries at `query_indices`."""
        queries = tokens.materialize() if isinstance(tokens, Tokens) else tokens
        checks.has_shape("tokens", queries, "b n c", last=self.dim)
        return queries if query_indices is None else select(queries, query_indices)
