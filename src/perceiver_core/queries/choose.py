"""Some of the queries, by their indices; and what takes points."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions import LearnedEmbedding


def check_indices(query_indices: Tensor, count: int) -> None:
    """Raises unless `query_indices` are indices `q` or `b q`, on the CPU also unless they lie below `count`.

    Raises:
        TypeError: not whole numbers.
        ValueError: another rank, none at all, or numbers beyond what there is.
    """
    if not isinstance(query_indices, Tensor) or query_indices.is_floating_point() or query_indices.dtype == torch.bool:
        got = getattr(query_indices, "dtype", type(query_indices).__name__)
        raise TypeError(f"query_indices must be indices, a tensor of whole numbers; got {got}")
    if query_indices.ndim not in (1, 2) or query_indices.numel() == 0:
        raise ValueError(
            f"query_indices must be q or b q indices, one at least; got shape {tuple(query_indices.shape)}"
        )
    checks.below("query_indices", query_indices, count)


def check_takes_points(positions: object) -> None:
    """Raises TypeError unless positions have dim and num_axes, and features of any point."""
    forward = getattr(type(positions), "forward", None)
    takes_them = (
        callable(positions) and forward is not nn.Module.forward and not isinstance(positions, LearnedEmbedding)
    )
    if not takes_them or not hasattr(positions, "dim") or not hasattr(positions, "num_axes"):
        raise TypeError(
            f"positions must have dim and num_axes and take points, as positions.Fourier; got {positions!r}"
        )


def chosen(queries: Float[Tensor, "#b n e"], query_indices: Int[Tensor, "*b q"]) -> Float[Tensor, "#b q e"]:
    """The queries at these indices."""
    check_indices(query_indices, queries.shape[1])
    if query_indices.ndim == 1:
        return queries[:, query_indices]
    return queries.expand(query_indices.shape[0], -1, -1).gather(
        1, query_indices[..., None].expand(-1, -1, queries.shape[-1])
    )
