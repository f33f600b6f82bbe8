"""Position features of arbitrary points."""

from __future__ import annotations

from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn

from perceiver_core.positions.learned_embedding import LearnedEmbedding
from perceiver_core.positions.learned_grid import LearnedGrid
from perceiver_core.positions.projected import Projected


@runtime_checkable
class PointFeatures(Protocol):
    """Position features that are called with points `*b axes` and return features `*b dim`, such as `Fourier`."""

    dim: int
    num_axes: int

    def __call__(self, points: Tensor, /) -> Tensor:
        """Return the features."""


def takes_points(positions: object) -> TypeGuard[PointFeatures]:
    """Return whether positions have `dim` and `num_axes`, and are called with points."""
    forward = getattr(type(positions), "forward", None)
    if not callable(positions) or forward is nn.Module.forward:
        return False
    if isinstance(positions, (LearnedEmbedding, LearnedGrid, Projected)):  # called with indices or grids
        return False
    return hasattr(positions, "dim") and hasattr(positions, "num_axes")


def check_takes_points(positions: object) -> None:
    """Raise TypeError unless positions take points."""
    if not takes_points(positions):
        raise TypeError(
            f"positions must have dim and num_axes and take points, as positions.Fourier; got {positions!r}"
        )
