"""Joint attention block of a resampler: latents attend to tokens and to each other with a single softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, masks
from perceiver_core.blocks.factory import build
from perceiver_core.blocks.mlp import MLP
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.reads.caches import AttentionCapture
from perceiver_core.registry import register


@register
class JointAttend(nn.Module):
    """Pre-norm joint attention block: x + attention(norm(x), [norm(tokens), norm(x)]), then x + mlp(norm(x)).

    Keys and values are computed from the tokens followed by the latents, so both must have the same width.
    Latents always attend to each other, so a sample may have no valid tokens.

    Args:
        dim: Width of the latents and of the tokens.
        num_heads: Number of attention heads.
        attention: Factory `(dim, num_heads=num_heads) -> module`.
        mlp: Factory `dim -> module`.
        norm: Factory `width -> module` for the three norms: of the latents, of the tokens and before the MLP.
        dropout: Dropout rate of the attention output and the MLP output.

    Example:
        >>> pc.JointAttend(32, num_heads=4)(torch.randn(2, 5, 32), torch.randn(2, 50, 32)).shape
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
        self.norm, self.input_norm = build("norm", norm, dim), build("norm", norm, dim)
        self.attention = build("attention", attention, dim, num_heads=num_heads)
        self.mlp_norm, self.mlp = build("norm", norm, dim), build("mlp", mlp, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "#b m d"],
        tokens: Float[Tensor, "b n d"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents after joint attention and the MLP.

        Args:
            x: Latents. A batch size of 1 is broadcast.
            tokens: Tokens.
            mask: Key-padding mask, True for valid tokens.
            capture: Container that stores the attention weights over the n tokens, followed by the m latents.
        """
        if mask is not None:
            checks.is_mask("mask", mask, tokens.shape[:-1])
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        normed = self.norm(x)
        inputs = torch.cat([self.input_norm(tokens), normed.expand(tokens.shape[0], -1, -1)], 1)
        valid = None if mask is None else masks.Padding(F.pad(mask, (0, x.shape[1]), value=True))
        options = {} if capture is None else {"capture": capture}
        x = x + self.dropout(self.attention(normed, inputs, mask=valid, **options))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
