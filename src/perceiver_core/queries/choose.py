"""Some of the queries, by their indices; and what takes points."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions import LearnedEmbedding


def check_indices(at: Tensor, count: int) -> None:
    """Raises unless `at` are indices `q` or `b q`, on the CPU also unless they lie below `count`.

    Raises:
        TypeError: not whole numbers.
        ValueError: another rank, none at all, or numbers beyond what there is.
    """
    if not isinstance(at, Tensor) or at.is_floating_point() or at.dtype == torch.bool:
        raise TypeError(f"at must be indices, a tensor of whole numbers; got {getattr(at, 'dtype', type(at).__name__)}")
    if at.ndim not in (1, 2) or at.numel() == 0:
        raise ValueError(f"at must be q or b q indices, one at least; got shape {tuple(at.shape)}")
    checks.below("at", at, count)


def check_takes_points(positions: object) -> None:
    """Raises TypeError unless positions have dim and axes, and features of any point."""
    forward = getattr(type(positions), "forward", None)
    takes_them = callable(positions) and forward is not nn.Module.forward and not isinstance(positions, LearnedEmbedding)
    if not takes_them or not hasattr(positions, "dim") or not hasattr(positions, "num_axes"):
        raise TypeError(f"positions must have dim and axes and take points, as positions.Fourier; got {positions!r}")


def chosen(queries: Float[Tensor, "#b n e"], at: Int[Tensor, "*b q"]) -> Float[Tensor, "#b q e"]:
    """The queries at these indices."""
    check_indices(at, queries.shape[1])
    if at.ndim == 1:
        return queries[:, at]
    return queries.expand(at.shape[0], -1, -1).gather(1, at[..., None].expand(-1, -1, queries.shape[-1]))
