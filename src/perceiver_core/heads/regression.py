"""Regression: real values from the mean of the latents."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks.factory import build
from perceiver_core.layers import init
from perceiver_core.registry import register


@register
class Regression(nn.Module):
    """Real values from the mean of the latents: mean, norm, dropout, linear layer.

    Args:
        dim: Width of the latents.
        num_outputs: Number of values.
        norm: Factory `dim -> module`.
        dropout: Rate of dropout before the linear layer.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Regression
        >>> Regression(32, num_outputs=3)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, dim: int, num_outputs: int = 1, *, norm: Callable[[int], nn.Module] = nn.LayerNorm, dropout: float = 0.0
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, num_outputs=num_outputs)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.dropout = build(norm, dim), nn.Dropout(dropout)
        self.values = init.linear(dim, num_outputs)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b values"]:
        """Return the values, which are unbounded."""
        return self.values(self.dropout(self.norm(latents.mean(1))))
