"""Positions of another width: any, projected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.positions.grid import Positions
from perceiver_core.registry import register


@register
class Projected(nn.Module):
    """A linear layer over position features. Their tables are projected, not every token.

    Args:
        positions: any position features.
        dim: what they become.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import LearnedGrid, Projected
        >>> where = Projected(LearnedGrid((14, 14), dim=32), dim=256)
        >>> where.tables((14, 14), like=torch.zeros(()))[0].shape
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
        """Return the tables projected; the bias is in the first."""
        tables: tuple[Tensor, ...] = self(grid, like)
        return tables

    def forward(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """Return the tables projected; the bias is in the first."""
        first, *others = (table.to(self.project.weight.dtype) for table in self.positions.tables(grid, like))
        projected = [self.project(first)]
        if others:
            bias = self.project(torch.zeros_like(first).flatten(0, -2)[:1])
            projected += [self.project(table) - bias for table in others]
        return tuple(table.to(like.dtype) for table in projected)
