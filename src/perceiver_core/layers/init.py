"""Weight initialization, as in the Perceiver's published code (deepmind-research/perceiver).

- Linear layers: truncated normal with fan-in variance scaling (scale 1) and zero bias (`io_processors` and
  `perceiver.py`, `conv_1d`, `init_scale=1.0`).
- Latent array and learned positions: normal with standard deviation 0.02, truncated at two standard deviations
  (`TrainablePositionEncoding`, `init_scale=0.02`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_core.layers.linear import Linear

# Standard deviation of a standard normal truncated to [-2, 2]. Dividing by it makes up for the truncation.
TRUNCATED_STD = 0.87962566103423978


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer with weights of variance 1 / in_features and zero bias."""
    layer = Linear(in_features, out_features, bias=bias)
    fan_in_(layer.weight, in_features)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def fan_in_(weight: Tensor, fan_in: int) -> Tensor:
    """Fill `weight` in-place from a truncated normal distribution with variance 1 / fan_in."""
    std = 1 / math.sqrt(fan_in) / TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def as_input(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter, to be passed to a module.

    Under `torch.no_grad`, views of a parameter still require a gradient, but have no graph. FlopCounterMode and other
    tools that register hooks on the inputs of modules fail at such tensors.
    """
    return parameter.clone()


def embedding(*shape: int, std: float = 0.02) -> nn.Parameter:
    """Return a parameter drawn from a normal distribution with standard deviation `std`, truncated at `2 * std`."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-2 * std, b=2 * std))
