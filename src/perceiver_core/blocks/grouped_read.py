"""Grouped read: stretches of the input are read by latents of their own. One level of a Hierarchical Perceiver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.blocks.cross_attend import CrossAttend
from perceiver_core.blocks.latent_transformer import LatentTransformer
from perceiver_core.blocks.self_attend import SelfAttend
from perceiver_core.blocks.mlp import MLP
from perceiver_core.registry import register

LATENT_TRANSFORMER = partial(LatentTransformer, block=partial(SelfAttend, mlp=partial(MLP, widening_factor=4)))
"""The latent transformer of deepmind/hierarchical_perceiver, whose MLPs are four times as wide."""


@register
@dataclass(frozen=True)
class Level:
    """The sizes of one level.

    Args:
        num_groups: how many groups its input is cut into.
        num_latents: how many latents each group has.
        dim: their width.
        depth: how many self-attends follow the read.
        num_heads: heads of these.

    Raises:
        ValueError: sizes below 1.

    Example:
        >>> from perceiver_core import Level
        >>> [Level(16, num_latents=128, dim=128, num_heads=4), Level(1, num_latents=64, dim=1024, depth=18, num_heads=32)][1].groups
        1
    """

    num_groups: int
    num_latents: int
    dim: int
    depth: int = 2
    num_heads: int = 8

    def __post_init__(self) -> None:
        checks.positive(num_groups=self.num_groups, num_latents=self.num_latents, dim=self.dim, num_heads=self.num_heads)


@register
class GroupedRead(nn.Module):
    """One level: every group is read by its own latents, which then attend to each other.

        tokens = b (g n) c -> (b g) n c;  latents = transformer(read(latents, tokens));  (b g) z d -> b (g z) d

    Weights are the same for all groups, latents are not. Tokens that groups do not divide are padded at the end, by
    tokens that are not there; a group without tokens keeps its latents.

    Args:
        input_dim: the width of the tokens.
        level: the sizes.
        skip_dim: the width of what is added to the latents before they read; None where nothing is.
        cross_attention: makes a cross-attend from (dim, input_dim).
        latent_transformer: makes a latent transformer from (dim, depth=depth, heads=heads).

    Example:
        >>> import torch
        >>> from perceiver_core import GroupedRead, Level
        >>> GroupedRead(10, Level(4, num_latents=7, dim=32, depth=1))(torch.randn(2, 50, 10)).shape
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
        self.input_dim, self.dim, self.level = input_dim, level.dim, level
        self.latents = init.embedding(level.num_groups, level.num_latents, level.dim)
        self.skip = nn.Identity() if skip_dim in (None, level.dim) else init.linear(skip_dim, level.dim)
        self.cross_attention = cross_attention(level.dim, input_dim)
        self.latent_transformer = latent_transformer(level.dim, depth=level.depth, num_heads=level.num_heads)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        skip: Float[Tensor, "b m s"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """The latents of all groups, one group after the other.

        Args:
            tokens: what is read.
            mask: which of them are there.
            skip: what is added to the latents before they read, of as many vectors.
        """
        groups = self.level.num_groups
        x = repeat(self.latents, "g z d -> (b g) z d", b=tokens.shape[0])
        if skip is not None:
            x = x + rearrange(self.skip(skip), "b (g z) d -> (b g) z d", g=groups)
        if mask is None and tokens.shape[1] % groups:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is not None:
            mask = rearrange(grouped(mask.unsqueeze(-1), groups), "bg n 1 -> bg n")
        x = self.latent_transformer(self.cross_attention(x, grouped(tokens, groups), mask=mask))
        return rearrange(x, "(b g) z d -> b (g z) d", g=groups)


def grouped(x: Shaped[Tensor, "b n c"], groups: int) -> Shaped[Tensor, "bg size c"]:
    """Stretches of equal size, each a sample of its own; the last ones are padded with zeros.

    Example:
        >>> import torch
        >>> from perceiver_core.blocks.grouped_read import grouped
        >>> grouped(torch.ones(1, 5, 1), groups=2)[..., 0].int().tolist()
        [[1, 1, 1], [1, 1, 0]]
    """
    size = (x.shape[1] + groups - 1) // groups
    padding = size * groups - x.shape[1]
    if torch.compiler.is_compiling() or padding:  # a graph must not depend on whether there is any
        x = F.pad(x, (0, 0, 0, padding))
    return rearrange(x, "b (g n) c -> (b g) n c", g=groups, n=size)
