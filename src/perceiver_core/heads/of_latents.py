"""Heads of latents: one answer from all of them."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register


@register
class Classify(nn.Module):
    """Logits from the mean of the latents: mean, norm, dropout, linear.

    Args:
        dim: the width of the latents.
        classes: how many logits.
        norm: makes a norm from a width; `nn.Identity` for the paper's head, which has none.
        dropout: the rate of dropout before the linear layer.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Classify
        >>> Classify(32, classes=5)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 5])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1 (mean, linear); the norm is perceiver-pytorch's.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, classes=classes)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.dropout = norm(dim), nn.Dropout(dropout)
        self.logits = init.linear(dim, classes)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b classes"]:
        """One logit a class."""
        logits: Tensor = self.logits(self.dropout(self.norm(latents.mean(1))))
        return logits


@register
class Regress(nn.Module):
    """Real values from the mean of the latents: mean, norm, dropout, linear.

    Args:
        dim: the width of the latents.
        values: how many values.
        norm: makes a norm from a width.
        dropout: the rate of dropout before the linear layer.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Regress
        >>> Regress(32, values=3)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        dim: int,
        values: int = 1,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, values=values)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.dropout = norm(dim), nn.Dropout(dropout)
        self.values = init.linear(dim, values)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b values"]:
        """The values, on any scale."""
        values: Tensor = self.values(self.dropout(self.norm(latents.mean(1))))
        return values


@register
class Latents(nn.Module):
    """No head: the latents themselves.

    Example:
        >>> import torch
        >>> from perceiver_core.heads import Latents
        >>> Latents()(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """What came."""
        return latents
