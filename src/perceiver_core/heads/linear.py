"""Linear projection of every decoder output."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.registry import register


@partial(register, name="heads.Linear")
class Linear(nn.Module):
    """A linear layer, for example to the channels of a pixel or the logits of a token.

    Args:
        dim: Width of a decoder output.
        out_dim: Width after the projection.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Linear(32, out_dim=3)(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 3])
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim, out_dim=out_dim)
        self.dim = dim
        self.values = init.linear(dim, out_dim)

    def forward(self, outputs: Float[Tensor, "b q d"]) -> Float[Tensor, "b q values"]:
        """Return the projected outputs."""
        return self.values(outputs)
