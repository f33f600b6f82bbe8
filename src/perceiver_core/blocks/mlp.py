"""MLP of the attention blocks, and activations that are not in `torch.nn`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.registry import register


@register
class GEGLU(nn.Module):
    """Gated GELU, `values * gelu(gates)`, where `values` and `gates` are the first and second half of the channels.

    Example:
        >>> pc.GEGLU()(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 8])

    Reference: Shazeer 2020, equation 6; the order [values, gates] is as in perceiver-pytorch.
    """

    inputs_per_output = 2

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b half"]:
        """Split the channels of `x` into `values` and `gates`, and return `values * gelu(gates)`."""
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)


@register
class SwiGLU(nn.Module):
    """Gated SiLU, `values * silu(gates)`, where `values` and `gates` are the first and second half of the channels.

    Example:
        >>> pc.SwiGLU()(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 8])

    Reference: Shazeer 2020, equation 6.
    """

    inputs_per_output = 2

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b half"]:
        """Split the channels of `x` into `values` and `gates`, and return `values * silu(gates)`."""
        values, gates = x.chunk(2, dim=-1)
        return values * F.silu(gates)


@register
class SquaredReLU(nn.Module):
    """Squared ReLU, `relu(x)^2`, as used in Perceiver AR.

    Example:
        >>> pc.SquaredReLU()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])

    Reference: So et al. 2021 (Primer), section 4.
    """

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Return the squares of positive values, and zero for all other values."""
        return F.relu(x).square()


@register
class MLP(nn.Module):
    """Multilayer perceptron: linear layer, activation, linear layer, dropout.

    Args:
        dim: Input width.
        out_dim: Output width; `dim` by default.
        hidden_dim: Hidden width; `dim * widening_factor` by default.
        widening_factor: Ratio of the hidden width to `dim`: 1 in DeepMind's published encoders, 4 in perceiver-pytorch.
        activation: Activation module; `nn.GELU("tanh")` by default, as in DeepMind's code. transformers and
            perceiver-pytorch use `nn.GELU()`. An activation with fewer output than input channels, such as `GEGLU`,
            must have the attribute `inputs_per_output`, the ratio of input to output channels.
        bias: Whether the linear layers have a bias.
        dropout: Dropout rate of the output.

    Example:
        >>> pc.MLP(32, widening_factor=4, activation=pc.GEGLU())(torch.randn(2, 3, 32)).shape
        torch.Size([2, 3, 32])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        hidden_dim: int | None = None,
        widening_factor: int = 1,
        activation: nn.Module | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, widening_factor=widening_factor)
        checks.probability(dropout=dropout)
        out_dim = dim if out_dim is None else out_dim
        hidden_dim = dim * widening_factor if hidden_dim is None else hidden_dim
        checks.positive(out_dim=out_dim, hidden_dim=hidden_dim)
        self.activation = nn.GELU("tanh") if activation is None else activation
        self.expand = init.linear(dim, hidden_dim * getattr(self.activation, "inputs_per_output", 1), bias=bias)
        self.contract = init.linear(hidden_dim, out_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
        """Apply the MLP to each vector along the last axis."""
        hidden = self.activation(apply_linear(self.expand, x))
        return self.dropout(apply_linear(self.contract, hidden))
