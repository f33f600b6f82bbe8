"""Heads of latents: one answer from all of them."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register


@register
class Classification(nn.Module):
    """Logits from the mean of the latents: mean, norm, dropout, linear.

    Args:
        dim: the width of the latents.
        num_classes: how many logits.
        norm: makes a norm from a width; `nn.Identity` for the paper's head, which has none.
        dropout: the rate of dropout before the linear layer.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Classification
        >>> Classification(32, num_classes=5)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 5])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1 (mean, linear); the norm is perceiver-pytorch's.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, num_classes=num_classes)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.dropout = norm(dim), nn.Dropout(dropout)
        self.logits = init.linear(dim, num_classes)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b classes"]:
        """One logit a class."""
        logits: Tensor = self.logits(self.dropout(self.norm(latents.mean(1))))
        return logits


@register
class Regression(nn.Module):
    """Real values from the mean of the latents: mean, norm, dropout, linear.

    Args:
        dim: the width of the latents.
        num_outputs: how many values.
        norm: makes a norm from a width.
        dropout: the rate of dropout before the linear layer.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Regression
        >>> Regression(32, num_outputs=3)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int = 1,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, num_outputs=num_outputs)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.dropout = norm(dim), nn.Dropout(dropout)
        self.values = init.linear(dim, num_outputs)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b values"]:
        """The values, on any scale."""
        values: Tensor = self.values(self.dropout(self.norm(latents.mean(1))))
        return values


@register
class Identity(nn.Module):
    """No head: the latents themselves.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Identity
        >>> Identity()(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """What came."""
        return latents
