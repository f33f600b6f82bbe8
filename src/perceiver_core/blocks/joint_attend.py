"""Joint attend: latents read tokens and each other in one softmax. What a Resampler is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.masks import Padding
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.blocks.mlp import MLP
from perceiver_core.registry import register


@register
class JointAttend(nn.Module):
    """x + attention(norm(x), [norm(tokens), norm(x)]), then x + mlp(norm(x)).

    Keys and values are of the tokens and, after them, of the latents, by the same projections, so tokens have the
    width of the latents. Latents always attend to each other: a sample without a token is well defined.

    Args:
        dim: the width of latents and tokens.
        num_heads: attention heads.
        attention: makes the attention from (dim, heads=heads).
        mlp: makes the MLP from (dim).
        norm: makes a norm from a width; the latents', the tokens' and the MLP's are three.
        dropout: the rate at which what is added to the residual is dropped in training.

    Example:
        >>> import torch
        >>> from perceiver_core import JointAttend
        >>> JointAttend(32, num_heads=4)(torch.randn(2, 5, 32), torch.randn(2, 50, 32)).shape
        torch.Size([2, 5, 32])

    Reference: Alayrac et al. 2022 (Flamingo), figure 5 and appendix A.1.1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        attention: Callable[..., nn.Module] = MultiHeadAttention,
        mlp: Callable[[int], nn.Module] = MLP,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim)
        checks.probability(dropout=dropout)
        self.dim = dim
        self.norm, self.input_norm = norm(dim), norm(dim)
        self.attention = attention(dim, num_heads=num_heads)
        self.mlp_norm, self.mlp = norm(dim), mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "#b m d"], tokens: Float[Tensor, "b n d"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """What the latents have become after reading.

        Args:
            x: the latents; a batch of one is the same for all samples.
            tokens: what they read beside themselves.
            mask: which tokens are there.
        """
        normed, read = self._read(x, tokens, mask)
        x = x + self.dropout(self.attention(normed, read))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out

    def attention_map(
        self,
        x: Float[Tensor, "#b m d"],
        tokens: Float[Tensor, "b n d"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        queries: Any = None,
    ) -> Float[Tensor, "b h chosen n_and_m"]:
        """The weights with which chosen latents attend to each token and, after these, to each latent."""
        normed, read = self._read(x, tokens, mask)
        weights: Tensor = self.attention.attention_map(normed, read, queries=queries)  # type: ignore[operator]
        return weights

    def _read(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, KeysValues]:
        normed = self.norm(x)
        both = torch.cat([self.input_norm(tokens), normed.expand(tokens.shape[0], -1, -1)], 1)
        present = None if mask is None else Padding(F.pad(mask, (0, x.shape[1]), value=True))
        return normed, self.attention.keys_values(both, mask=present)  # type: ignore[operator]
