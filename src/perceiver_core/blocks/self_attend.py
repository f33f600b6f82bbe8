"""Self-attention block, the building block of a latent transformer."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks, masks
from perceiver_core.blocks import gates
from perceiver_core.blocks.factory import build
from perceiver_core.blocks.gates import Residual
from perceiver_core.blocks.mlp import MLP
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.masked_values import finite_where_masked
from perceiver_core.masks import Mask
from perceiver_core.reads.caches import Cache
from perceiver_core.registry import register


@register
class SelfAttend(nn.Module):
    """Pre-norm self-attention block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: Width of the vectors.
        num_heads: Number of attention heads.
        attention: Factory `(dim, num_heads=num_heads) -> module`. A custom module is called as `module(x, mask=mask)`
            with the normalized vectors.
        mlp: Factory `dim -> module`.
        norm: Factory `width -> module` for the two norms.
        residual: True to add the block's input to the attention output, False for the attention output alone, or a
            factory `dim -> module` for a gate that replaces the sum, such as `GRUGate`.
        mlp_residual: Same as `residual`, but for the MLP.
        dropout: Dropout rate of the attention output and the MLP output.

    Example:
        >>> pc.SelfAttend(32, num_heads=4)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Reference: deepmind-research/perceiver/perceiver.py, `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        attention: Callable[..., nn.Module] = MultiHeadAttention,
        mlp: Callable[[int], nn.Module] = MLP,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        residual: Residual = True,
        mlp_residual: Residual = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim)
        checks.probability(dropout=dropout)
        self.residual, self.mlp_residual = (
            gates.from_option("residual", residual, dim),
            gates.from_option("mlp_residual", mlp_residual, dim),
        )
        self.norm, self.attention = build("norm", norm, dim), build("attention", attention, dim, num_heads=num_heads)
        self.mlp_norm, self.mlp = build("norm", norm, dim), build("mlp", mlp, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the vectors after self-attention and the MLP.

        Args:
            x: Input vectors.
            mask: Attention mask. With a cache, it must also cover the cached keys.
            positions: Positions for rotary embeddings; by default consecutive, with 0 for the last vector.
            cache: Cache with the keys and values of earlier vectors (`reads.KeysValuesCache`), to which the keys and
                values of `x` are appended. With a causal mask, a sequence can then be split over several calls
                without changing the result. With rotary embeddings, this requires explicit `positions`.
        """
        if mask is not None and cache is None:
            x = finite_where_masked(x, mask, masks.Padding)
        options: dict[str, object] = {} if positions is None else {"positions": positions}
        if cache is not None:
            options["cache"] = cache
        attended = self.dropout(self.attention(self.norm(x), mask=mask, **options))
        x = x + attended if self.residual is True else gates.combine(self.residual, x, attended)
        out = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + out if self.mlp_residual is True else gates.combine(self.mlp_residual, x, out)
