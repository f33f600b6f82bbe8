"""Self-attend: the vectors of an array attend to each other. A block of the latent transformer."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks import gates
from perceiver_core.blocks.factory import build
from perceiver_core.blocks.gates import Residual
from perceiver_core.blocks.mlp import MLP
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.masks import Mask
from perceiver_core.reads.caches import Cache
from perceiver_core.registry import register


@register
class SelfAttend(nn.Module):
    """Self-attention and MLP, each after a norm: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: Width of the array.
        num_heads: Number of attention heads.
        attention: Factory `(dim, num_heads=num_heads) -> module`. A module of your own is called with the normalized
            array, `(x, *, mask)`.
        mlp: Factory `dim -> module`.
        norm: Factory `width -> module`.
        residual: Whether the array is added to the output of attention; or a factory `dim -> module` of a gate in
            place of the sum, such as `GRUGate`.
        mlp_residual: The same for the MLP.
        dropout: Rate at which the outputs of attention and MLP are dropped in training.

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
        self.residual, self.mlp_residual = gates.from_option(residual, dim), gates.from_option(mlp_residual, dim)
        self.norm, self.attention = build(norm, dim), build(attention, dim, num_heads=num_heads)
        self.mlp_norm, self.mlp = build(norm, dim), build(mlp, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the array after its vectors have attended to each other.

        Args:
            x: The array.
            mask: Attention mask; with a cache, from `x` to all vectors so far.
            positions: Positions of the vectors for rotary embeddings; consecutive by default, the last one being 0.
            cache: Keys and values of earlier vectors (`reads.KeysValuesCache`), to which those of `x` are appended.
                Under a causal mask an array in parts gives the same result as the whole.
        """
        options: dict[str, object] = {} if positions is None else {"positions": positions}
        if cache is not None:
            options["cache"] = cache
        attended = self.dropout(self.attention(self.norm(x), mask=mask, **options))
        x = x + attended if self.residual is True else gates.combine(self.residual, x, attended)
        out = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + out if self.mlp_residual is True else gates.combine(self.mlp_residual, x, out)
