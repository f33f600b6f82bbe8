"""Position features projected to another width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.positions.grid import Positions
from perceiver_core.registry import register


@register
class Projected(nn.Module):
    """A linear layer over position features, applied to their tables instead of every token.

    Args:
        positions: Position features.
        dim: Width after the projection.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import LearnedGrid, Projected
        >>> positions = Projected(LearnedGrid((14, 14), dim=32), dim=256)
        >>> positions.tables((14, 14), like=torch.zeros(()))[0].shape
        torch.Size([14, 14, 256])

    Reference: deepmind-research/perceiver, `project_pos_dim`; Perceiver IO's ImageNet model with learned positions.
    """

    def __init__(self, positions: Positions, dim: int) -> None:
        super().__init__()
        if not isinstance(positions, Positions):
            raise TypeError(f"positions must have dim, num_axes and tables, as Fourier has; got {positions!r}")
        checks.positive(dim=dim)
        self.positions, self.dim, self.num_axes = positions, dim, positions.num_axes
        self.project = init.linear(positions.dim, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """Return the projected tables; the bias is part of the first."""
        return self(grid, like)

    def forward(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """Return the projected tables; the bias is part of the first."""
        first, *others = (table.to(self.project.weight.dtype) for table in self.positions.tables(grid, like))
        projected = [self.project(first)]
        if others:
            bias = self.project(torch.zeros_like(first).flatten(0, -2)[:1])
            projected += [self.project(table) - bias for table in others]
        return tuple(table.to(like.dtype) for table in projected)
