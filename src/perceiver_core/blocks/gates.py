"""Gates: what a block makes of its array and of what that array has read, in place of their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks.factory import build
from perceiver_core.registry import register

Residual: TypeAlias = bool | Callable[[int], nn.Module]
"""Whether an array is added to what it has read; or what makes, from its width, a gate (array, read) -> array."""


@register
class GRUGate(nn.Module):
    """A gated recurrent unit whose state is the array and whose input is what it has read.

    Args:
        dim: the width of both.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> import perceiver_core as pc
        >>> read = pc.CrossAttend(32, 10, residual=pc.GRUGate)
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])

    Reference: Parisotto et al. 2020 (GTrXL), section 3.2; lucidrains/perceiver-pytorch, gated.py.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.cell = nn.GRUCell(dim, dim)

    def forward(self, x: Float[Tensor, "#b m d"], read: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """The array after the gate."""
        state = x.expand_as(read)
        after: Tensor = self.cell(read.flatten(0, 1), state.flatten(0, 1))
        return after.view_as(read)


@register
class TanhGate(nn.Module):
    """x + tanh(gate) read, with one learned gate, closed at first.

    As `residual` and as `mlp_residual` it makes a block that starts by doing nothing.

    Args:
        dim: the width of both, which does not matter.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> x, read = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        >>> torch.equal(pc.TanhGate(32)(x, read), x)
        True

    Reference: Alayrac et al. 2022 (Flamingo), section 2.2 and figure 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "#b m d"], read: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """The array after the gate."""
        return x + self.gate.tanh() * read


def from_option(residual: Residual, dim: int) -> bool | nn.Module:
    """What `joined` takes, from what a block was given."""
    if isinstance(residual, bool):
        return residual
    if isinstance(residual, nn.Module) or not callable(residual):
        raise TypeError(f"residual must be True, False or what makes a gate from a width, as GRUGate; got {residual!r}")
    return build(residual, dim)


def combine(residual: bool | nn.Module, x: Float[Tensor, "#b m d"], read: Float[Tensor, "b m d"]) -> Tensor:
    """The array and what it has read: their sum, the latter alone, or what a gate makes of them."""
    if isinstance(residual, bool):
        return x + read if residual else read
    out: Tensor = residual(x, read)
    return out
