"""Attention residuals: the input of a block is a weighted mean of the outputs of all previous blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.registry import register

Aggregate: TypeAlias = Callable[[int], nn.Module]
"""Factory `dim -> module`. The module combines a list of tensors, which broadcast to one shape, into one tensor."""


@register
class AttentionResidual(nn.Module):
    """Weighted mean of a list of tensors (`arrays`), with separate weights for each channel of each vector.

        logits = expand(project(norm(arrays)))        out = sum of softmax(logits, over the arrays) * arrays

    In a transformer, the arrays are the initial input and the outputs of all blocks so far. They are combined again for
    each block, so time and memory grow quadratically with depth.

    Args:
        dim: Width of the tensors.
        rank: Output width of the linear layer `project`, and input width of the linear layer `expand`.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> from functools import partial
        >>> aggregate = partial(pc.AttentionResidual, rank=8)
        >>> pc.LatentTransformer(32, depth=3, num_heads=4, aggregate=aggregate)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Reference: Chen et al. 2026 (Attention Residuals, arXiv:2603.15031); per-channel weights as in
    lucidrains/perceiver-pytorch 0.11, `EnformerAttentionResidual`.
    """

    def __init__(self, dim: int, *, rank: int = 64) -> None:
        super().__init__()
        checks.positive(dim=dim, rank=rank)
        self.norm = nn.RMSNorm(dim)
        self.project, self.expand = init.linear(dim, rank, bias=False), init.linear(rank, dim, bias=False)

    def forward(self, arrays: Sequence[Float[Tensor, "#b m d"]]) -> Float[Tensor, "b m d"]:
        """Return the weighted mean of the tensors, each broadcast to the shape of the last one."""
        if not arrays:
            raise ValueError("arrays must hold at least one tensor; got none")
        stacked = torch.stack([x.expand_as(arrays[-1]) for x in arrays], dim=-2)
        weights = self.expand(self.project(self.norm(stacked))).softmax(-2)
        return (weights * stacked).sum(-2)
