"""Gates: learned combinations of the input and output of a branch, instead of their sum."""

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
"""Whether the input of a branch is added to its output; or a factory `dim -> gate`, called as `gate(input, output)`."""


@register
class GRUGate(nn.Module):
    """Gated recurrent unit: its state is the input of a branch (attention or MLP), its input the branch's output.

    Args:
        dim: Width of both.

    Example:
        >>> read = pc.CrossAttend(32, 10, residual=pc.GRUGate)
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])

    Reference: Parisotto et al. 2020 (GTrXL), section 3.2; lucidrains/perceiver-pytorch, gated.py.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.cell = nn.GRUCell(dim, dim)

    def forward(self, x: Float[Tensor, "#b m d"], output: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """Return the next state of the unit."""
        return self.cell(output.flatten(0, 1), x.expand_as(output).flatten(0, 1)).view_as(output)


@register
class TanhGate(nn.Module):
    """Residual sum with a learned scalar gate, `x + tanh(gate) * output`, which is zero at initialization.

    A block with this gate as `residual` and as `mlp_residual` starts as the identity.

    Args:
        dim: Width of both, unused: the gate is a scalar.

    Example:
        >>> x, output = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        >>> torch.equal(pc.TanhGate(32)(x, output), x)
        True

    Reference: Alayrac et al. 2022 (Flamingo), section 2.2 and figure 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "#b m d"], output: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """Return the gated sum."""
        return x + self.gate.tanh() * output


def from_option(residual: Residual, dim: int) -> bool | nn.Module:
    """Return the gate of a `residual` option, or the option itself if it is True or False."""
    if isinstance(residual, bool):
        return residual
    if isinstance(residual, nn.Module) or not callable(residual):
        raise TypeError(f"residual must be True, False or a factory `dim -> gate` such as GRUGate; got {residual!r}")
    return build(residual, dim)


def combine(residual: bool | nn.Module, x: Float[Tensor, "#b m d"], output: Float[Tensor, "b m d"]) -> Tensor:
    """Combine the input and the output of a branch: their sum, the output alone, or the result of a gate."""
    if isinstance(residual, bool):
        return x + output if residual else output
    return residual(x, output)
