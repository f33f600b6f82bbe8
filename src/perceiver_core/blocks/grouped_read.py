"""Grouped read, one level of a Hierarchical Perceiver: separate latents attend to each group of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, tracing
from perceiver_core.blocks.cross_attend import CrossAttend
from perceiver_core.blocks.factory import build
from perceiver_core.blocks.latent_transformer import LatentTransformer
from perceiver_core.blocks.mlp import MLP
from perceiver_core.blocks.self_attend import SelfAttend
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.registry import register

LATENT_TRANSFORMER = partial(LatentTransformer, block=partial(SelfAttend, mlp=partial(MLP, widening_factor=4)))
"""Latent transformer as in deepmind/hierarchical_perceiver: the MLPs have four times the width of the latents."""


@register
@dataclass(frozen=True)
class Level:
    """Sizes of one level of a Hierarchical Perceiver.

    Args:
        num_groups: Number of groups into which the input of the level is split.
        num_latents: Number of latents per group.
        dim: Width of the latents.
        depth: Number of self-attention blocks after the cross-attention.
        num_heads: Number of attention heads in the self-attention blocks.

    Raises:
        ValueError: If a size other than `depth` is below 1.

    Example:
        >>> levels = pc.Level(16, num_latents=128, dim=128), pc.Level(1, num_latents=64, dim=1024, depth=18)
        >>> levels[1].num_groups
        1
    """

    num_groups: int
    num_latents: int
    dim: int
    depth: int = 2
    num_heads: int = 8

    def __post_init__(self) -> None:
        groups, latents, dim, heads = self.num_groups, self.num_latents, self.dim, self.num_heads
        checks.positive(num_groups=groups, num_latents=latents, dim=dim, num_heads=heads)


@register
class GroupedRead(nn.Module):
    """Cross-attention and latent transformer, applied to each group of tokens with separate latents per group.

        split tokens into g groups:  b (g n) c -> (b g) n c
        latents = latent_transformer(cross_attention(latents, tokens))
        concatenate the groups:      (b g) z d -> b (g z) d

    Each group has its own initial latents. All other parameters are shared by the groups. If the number of groups does
    not divide the number of tokens, masked padding tokens are appended. In a group that contains only padding, the
    input of the attention's output projection is zero.

    Args:
        input_dim: Width of the tokens.
        level: Sizes of the level; see `Level`.
        skip_dim: Width of a skip input that is added to the latents before the cross-attention; None for no skip input.
            If it differs from the width of the latents, the skip input is projected to that width.
        cross_attention: Factory `(dim, input_dim) -> module`.
        latent_transformer: Factory `(dim, depth=depth, num_heads=num_heads) -> module`.

    Example:
        >>> pc.GroupedRead(10, pc.Level(4, num_latents=7, dim=32, depth=1))(torch.randn(2, 50, 10)).shape
        torch.Size([2, 28, 32])

    Reference: Carreira et al. 2022 (Hierarchical Perceiver), section 3; deepmind/hierarchical_perceiver,
    `perceiver_blocks.py`, `PerceiverBlock`.
    """

    def __init__(
        self,
        input_dim: int,
        level: Level,
        *,
        skip_dim: int | None = None,
        cross_attention: Callable[..., nn.Module] = CrossAttend,
        latent_transformer: Callable[..., nn.Module] = LATENT_TRANSFORMER,
    ) -> None:
        super().__init__()
        checks.positive(input_dim=input_dim, **({} if skip_dim is None else {"skip_dim": skip_dim}))
        self.input_dim, self.dim, self.level = input_dim, level.dim, level
        self.latents = init.embedding(level.num_groups, level.num_latents, level.dim)
        self.skip = nn.Identity() if skip_dim in (None, level.dim) else init.linear(skip_dim, level.dim)
        self.cross_attention = build("cross_attention", cross_attention, level.dim, input_dim)
        self.latent_transformer = build(
            "latent_transformer", latent_transformer, level.dim, depth=level.depth, num_heads=level.num_heads
        )

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        skip: Float[Tensor, "b m s"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents of all groups, ordered by group.

        Args:
            tokens: Tokens.
            mask: Key-padding mask, True for valid tokens.
            skip: Skip input with one vector per latent, in the order of the output.
        """
        groups = self.level.num_groups
        x = self.latents.repeat(tokens.shape[0], 1, 1)  # (b g) z d; a copy even if b is 1
        if skip is not None:
            x = x + rearrange(apply_linear(self.skip, skip), "b (g z) d -> (b g) z d", g=groups)
        if mask is None and not tracing.always(tokens.shape[1] % groups == 0):
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is not None:
            mask = rearrange(grouped(mask.unsqueeze(-1), groups), "bg n 1 -> bg n")
        x = self.latent_transformer(self.cross_attention(x, grouped(tokens, groups), mask=mask))
        return rearrange(x, "(b g) z d -> b (g z) d", g=groups)


def grouped(x: Shaped[Tensor, "b n c"], groups: int) -> Shaped[Tensor, "bg size c"]:
    """Split tokens into contiguous groups of equal size, `b n c -> (b groups) size c`, with zero padding at the end.

    Example:
        >>> from perceiver_core.blocks.grouped_read import grouped
        >>> grouped(torch.ones(1, 5, 1), groups=2)[..., 0].int().tolist()
        [[1, 1, 1], [1, 1, 0]]
    """
    size = (x.shape[1] + groups - 1) // groups
    padding = size * groups - x.shape[1]
    if torch.compiler.is_compiling() or padding:  # a compiled graph must not depend on whether there is padding
        x = F.pad(x, (0, 0, 0, padding))
    return rearrange(x, "b (g n) c -> (b g) n c", g=groups, n=size)
