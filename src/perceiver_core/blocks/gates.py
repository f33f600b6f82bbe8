"""Gates: learned combinations of a branch's input and output that replace the residual sum."""

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
"""True to add a branch's input to its output, False for the output alone, or a factory `dim -> gate` for a gate.

The gate is a module that is called as `gate(input, output)`.
"""


@register
class GRUGate(nn.Module):
    """Gated recurrent unit (GRU) that replaces a residual sum.

    The hidden state is the input of the branch (attention or MLP). The input of the GRU is the output of the branch.

    Args:
        dim: Width of the branch's input and output.

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
        """Return the next hidden state of the GRU."""
        return self.cell(output.flatten(0, 1), x.expand_as(output).flatten(0, 1)).view_as(output)


@register
class TanhGate(nn.Module):
    """Residual sum with a learned scalar gate, `x + tanh(gate) * output`. The gate is initialized to zero.

    A block with this gate as `residual` and as `mlp_residual` is the identity at initialization.

    Args:
        dim: Width of the branch's input and output. Unused, because the gate is a scalar.

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
    """Build the gate of a `residual` option, or return the option itself if it is True or False."""
    if isinstance(residual, bool):
        return residual
    if isinstance(residual, nn.Module) or not callable(residual):
        raise TypeError(f"residual must be True, False or a factory `dim -> gate` such as GRUGate; got {residual!r}")
    return build(residual, dim)


def combine(residual: bool | nn.Module, x: Float[Tensor, "#b m d"], output: Float[Tensor, "b m d"]) -> Tensor:
    """Return the sum of a branch's input and output, the output alone, or the result of a gate."""
    if isinstance(residual, bool):
        return x + output if residual else output
    return residual(x, output)
