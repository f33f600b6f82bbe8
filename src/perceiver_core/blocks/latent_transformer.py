"""The latent transformer: latents attend to each other, a few blocks deep."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.attention.masks import Mask
from perceiver_core.blocks.attention import MultiHeadAttention
from perceiver_core.blocks.mlp import MLP
from perceiver_core.registry import register


@register
class SelfAttend(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: the width of the array.
        heads: attention heads.
        attention: makes the attention from (dim, heads=heads).
        mlp: makes the MLP from (dim).
        norm: makes a norm from a width.
        residual: whether the array is added to what it read of itself.
        dropout: the rate at which what is added to the residual is dropped in training.

    Example:
        >>> import torch
        >>> from perceiver_core import SelfAttend
        >>> SelfAttend(32, heads=4)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Reference: deepmind-research/perceiver/perceiver.py, `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        attention: Callable[..., nn.Module] = MultiHeadAttention,
        mlp: Callable[[int], nn.Module] = MLP,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim)
        checks.probability(dropout=dropout)
        self.residual = residual
        self.norm, self.attention = norm(dim), attention(dim, heads=heads)
        self.mlp_norm, self.mlp = norm(dim), mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b m d"], *, mask: Mask | None = None) -> Float[Tensor, "b m d"]:
        """The array after its vectors have attended to each other."""
        normed = self.norm(x)
        read = self.attention.keys_values(normed, mask=mask)  # type: ignore[operator]
        attended = self.dropout(self.attention(normed, read))
        x = x + attended if self.residual else attended
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


@register
class LatentTransformer(nn.Module):
    """`depth` self-attends, one after the other.

    Args:
        dim: the width of the latents.
        depth: how many blocks; 0 passes the latents on.
        heads: attention heads.
        block: makes a block from (dim, heads=heads); `functools.partial` of `SelfAttend` sets the rest.
        repeats: how often the blocks are gone through, with the same weights each time.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from perceiver_core import GEGLU, LatentTransformer, MLP, SelfAttend
        >>> block = partial(SelfAttend, mlp=partial(MLP, widening=4, activation=GEGLU()))
        >>> LatentTransformer(32, depth=3, heads=4, block=block)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1; repeats: Jaegle et al. 2022 (Perceiver IO), appendix E.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        heads: int = 8,
        block: Callable[..., nn.Module] = SelfAttend,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        checks.positive(at_most=10_000, repeats=repeats)
        self.repeats = repeats
        if not 0 <= depth <= 10_000:
            raise ValueError(f"depth must lie in 0 ... 10,000; got {depth}")
        self.blocks = nn.ModuleList(block(dim, heads=heads) for _ in range(depth))

    def forward(self, x: Float[Tensor, "b m d"], *, mask: Mask | None = None) -> Float[Tensor, "b m d"]:
        """The latents after every block."""
        for _ in range(self.repeats):
            for block in self.blocks:
                x = block(x, mask=mask)
        return x
