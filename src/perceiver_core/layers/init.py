"""Initialization of all weights, as in the Perceiver's published code (deepmind-research/perceiver).

- Linear layers: variance scaling of scale 1, fan-in, truncated normal; bias zero (`io_processors` and `perceiver.py`,
  `conv_1d`, `init_scale=1.0`).
- Latent array and learned positions: normal of standard deviation 0.02, truncated at two standard deviations
  (`TrainablePositionEncoding`, `init_scale=0.02`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_core.layers.linear import Linear

# Standard deviation of a standard normal truncated to [-2, 2]; weights are divided by it to restore their scale.
TRUNCATED_STD = 0.87962566103423978


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer whose weights have variance 1 / in_features, and whose bias is zero."""
    layer = Linear(in_features, out_features, bias=bias)
    fan_in_(layer.weight, in_features)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def fan_in_(weight: Tensor, fan_in: int) -> Tensor:
    """Fill `weight` from a truncated normal distribution of variance 1 / fan_in."""
    std = 1 / math.sqrt(fan_in) / TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def embedding(*shape: int, std: float = 0.02) -> nn.Parameter:
    """Return a learned array (latents, positions): normal, truncated at two standard deviations."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-2 * std, b=2 * std))
