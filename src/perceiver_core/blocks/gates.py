"""Gates that replace the residual sum of an attention or MLP branch."""

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
"""Residual option of a branch: True for `input + output`, False for `output` alone, or a factory `dim -> gate`.

A gate is a module that replaces the sum and is called as `gate(input, output)`.
"""


@register
class GRUGate(nn.Module):
    """Gate that replaces the residual sum `x + output` with a gated recurrent unit (GRU).

    `x` (the input of the attention or MLP branch) is the hidden state of the GRU. `output` (the output of the branch)
    is the input of the GRU.

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
        """Return `GRUCell(output, x)`, the next hidden state of the GRU."""
        return self.cell(output.flatten(0, 1), x.expand_as(output).flatten(0, 1)).view_as(output)


@register
class TanhGate(nn.Module):
    """Residual sum with a learned scalar gate, `x + tanh(gate) * output`. The gate is initialized to zero.

    A block with this gate as `residual` and as `mlp_residual` is the identity at initialization.

    Args:
        dim: Width of the branch's input and output. Not used, because the gate is a scalar.

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
        """Return `x + tanh(gate) * output`."""
        return x + self.gate.tanh() * output


def from_option(name: str, residual: Residual, dim: int) -> bool | nn.Module:
    """Return `residual` if it is True or False, else build the gate. `name` is the name of the argument."""
    return residual if isinstance(residual, bool) else build(name, residual, dim)


def combine(residual: bool | nn.Module, x: Float[Tensor, "#b m d"], output: Float[Tensor, "b m d"]) -> Tensor:
    """Return `x + output` if `residual` is True, `output` if it is False, or `residual(x, output)` for a gate."""
    if isinstance(residual, bool):
        return x + output if residual else output
    return residual(x, output)
