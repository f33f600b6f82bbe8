"""Heads for classification and regression on mean-pooled latents."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks.factory import build
from perceiver_core.layers import init
from perceiver_core.registry import register


@register
class LatentMean(nn.Module):
    """Head that returns mean-pooled latents as features: mean, norm, dropout.

    It is the base class of `Classification` and `Regression`, which add a linear layer.

    Args:
        dim: Width of the latents.
        norm: Factory `dim -> module` for the norm.
        dropout: Dropout rate.

    Example:
        >>> pc.heads.LatentMean(32)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(self, dim: int, *, norm: Callable[[int], nn.Module] = nn.LayerNorm, dropout: float = 0.0) -> None:
        super().__init__()
        checks.positive(dim=dim)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.dropout = build("norm", norm, dim), nn.Dropout(dropout)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Tensor:
        """Return the mean of the latents after norm and dropout."""
        checks.is_floating("latents", latents)
        checks.not_empty("latents", latents)
        return self.dropout(self.norm(latents.mean(1)))


@register
class Classification(LatentMean):
    """Classification head on mean-pooled latents: norm, dropout, linear layer.

    Args:
        dim: Width of the latents.
        num_classes: Number of classes.
        norm: Factory `dim -> module` for the norm. Use `nn.Identity` for the paper's head, which has no norm.
        dropout: Rate of the dropout before the linear layer.

    Example:
        >>> pc.heads.Classification(32, num_classes=5)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 5])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1 (mean, linear layer); lucidrains/perceiver-pytorch (norm).
    """

    def __init__(
        self, dim: int, num_classes: int, *, norm: Callable[[int], nn.Module] = nn.LayerNorm, dropout: float = 0.0
    ) -> None:
        super().__init__(dim, norm=norm, dropout=dropout)
        checks.positive(num_classes=num_classes)
        self.logits = init.linear(dim, num_classes)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b classes"]:
        """Return the logits of all classes."""
        return self.logits(super().forward(latents))


@register
class Regression(LatentMean):
    """Regression head on mean-pooled latents: norm, dropout, linear layer.

    `num_outputs` is the number of output values per sample. See `Classification` for the other arguments.

    Example:
        >>> pc.heads.Regression(32, num_outputs=3)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, dim: int, num_outputs: int = 1, *, norm: Callable[[int], nn.Module] = nn.LayerNorm, dropout: float = 0.0
    ) -> None:
        super().__init__(dim, norm=norm, dropout=dropout)
        checks.positive(num_outputs=num_outputs)
        self.values = init.linear(dim, num_outputs)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b values"]:
        """Return the output values, which are unbounded."""
        return self.values(super().forward(latents))
