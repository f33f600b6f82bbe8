"""Positions of another width: any, projected."""

from __future__ import annotations

from collections.abc import Sequence

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
            raise TypeError(f"positions must have dim, axes and tables, as Fourier has; got {positions!r}")
        checks.positive(dim=dim)
        self.positions, self.dim, self.num_axes = positions, dim, positions.num_axes
        self.project = init.linear(positions.dim, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """The tables projected; the bias is in the first."""
        tables = self.positions.tables(grid, like)
        weight, bias = self.project.weight.to(like.dtype), self.project.bias.to(like.dtype)
        first, *others = [table @ weight.mT for table in tables]
        return (first + bias, *others)
