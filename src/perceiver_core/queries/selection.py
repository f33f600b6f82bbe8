"""Functions that check query indices and select queries."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from perceiver_core import checks


def check_indices(query_indices: Tensor, num_queries: int) -> None:
    """Check that `query_indices` is an integer tensor `q` or `b q` with q > 0 and values in 0 ... num_queries - 1.

    The values are checked on the CPU in eager mode only.
    """
    if not isinstance(query_indices, Tensor) or query_indices.is_floating_point() or query_indices.dtype == torch.bool:
        got = getattr(query_indices, "dtype", type(query_indices).__name__)
        raise TypeError(f"query_indices must be indices, an integer tensor; got {got}")
    if query_indices.ndim not in (1, 2) or query_indices.shape[-1] == 0:
        raise ValueError(
            f"query_indices must be q or b q indices, one at least; got shape {tuple(query_indices.shape)}"
        )
    checks.below("query_indices", query_indices, num_queries)


def select(queries: Float[Tensor, "#b n e"], query_indices: Int[Tensor, "*b q"]) -> Float[Tensor, "#b q e"]:
    """Return the queries at `query_indices`. A batch size of 1 in `queries` is broadcast."""
    check_indices(query_indices, queries.shape[1])
    if query_indices.ndim == 1:
        return queries[:, query_indices]
    indices = query_indices[..., None].expand(-1, -1, queries.shape[-1])
    return queries.expand(query_indices.shape[0], -1, -1).gather(1, indices)
