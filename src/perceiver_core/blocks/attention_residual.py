"""Attention residuals: each block starts from a weighted mean of what all before it have made, not from the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register

Aggregate: TypeAlias = Callable[[int], nn.Module]
"""Factory `dim -> module` that combines arrays of one shape: `(arrays) -> array`."""


@register
class AttentionResidual(nn.Module):
    """A mean of several arrays, in which every channel of every vector weighs them for itself.

        logits = expand(project(norm(arrays)))        out = sum of softmax(logits, over the arrays) * arrays

    All arrays so far are kept and weighed anew at each block, so time and memory grow with the square of the depth.

    Args:
        dim: the width of the arrays.
        rank: the width that the logits go through.

    Raises:
        ValueError: sizes below 1.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from functools import partial
        >>> pool = partial(pc.AttentionResidual, rank=8)
        >>> pc.LatentTransformer(32, depth=3, heads=4, pool=pool)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Reference: Chen et al. 2026 (Attention Residuals, arXiv:2603.15031); weights for each channel, as here, are those of
    lucidrains/perceiver-pytorch 0.11, `EnformerAttentionResidual`.
    """

    def __init__(self, dim: int, *, rank: int = 64) -> None:
        super().__init__()
        checks.positive(dim=dim, rank=rank)
        self.norm = nn.RMSNorm(dim)
        self.project, self.expand = init.linear(dim, rank, bias=False), init.linear(rank, dim, bias=False)

    def forward(self, arrays: Sequence[Float[Tensor, "#b m d"]]) -> Float[Tensor, "b m d"]:
        """The mean; each is expanded to the shape of the last."""
        past = torch.stack([x.expand_as(arrays[-1]) for x in arrays], dim=-2)
        weights: Tensor = self.expand(self.project(self.norm(past))).softmax(-2)
        return (weights * past).sum(-2)


def aggregate_states(aggregate: nn.Module, states: list[Tensor], x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
    """Append the output of a block to the states before it, and return what `aggregate` makes of all."""
    states.append(x)
    combined: Tensor = aggregate(states)
    return combined
