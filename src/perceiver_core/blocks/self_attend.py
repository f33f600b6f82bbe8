"""Self-attend: the vectors of an array attend to each other."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks import gates
from perceiver_core.blocks.gates import Residual
from perceiver_core.blocks.mlp import MLP
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.masks import Mask
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.registry import register


@register
class SelfAttend(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: the width of the array.
        num_heads: attention heads.
        attention: makes the attention from (dim, num_heads=num_heads).
        mlp: makes the MLP from (dim).
        norm: makes a norm from a width.
        residual: whether the array is added to what it read of itself; or what makes a gate in place of the sum from
            (dim), such as `GRUGate`.
        mlp_residual: the same of what the MLP gives.
        dropout: the rate at which what is added to the residual is dropped in training.

    Example:
        >>> import torch
        >>> from perceiver_core import SelfAttend
        >>> SelfAttend(32, num_heads=4)(torch.randn(2, 5, 32)).shape
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
        self.residual, self.mlp_residual = gates.made(residual, dim), gates.made(mlp_residual, dim)
        self.norm, self.attention = norm(dim), attention(dim, num_heads=num_heads)
        self.mlp_norm, self.mlp = norm(dim), mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b m d"], *, mask: Mask | None = None) -> Float[Tensor, "b m d"]:
        """The array after its vectors have attended to each other."""
        normed = self.norm(x)
        read = self.attention.keys_values(normed, mask=mask)  # type: ignore[operator]
        return self._after(x, self.attention(normed, read))

    def extend(
        self,
        x: Float[Tensor, "b m d"],
        before: KeysValues | None,
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
    ) -> tuple[Float[Tensor, "b m d"], KeysValues]:
        """The array goes on: what its next vectors become, and what later ones have to know of all so far.

        Under a causal mask an array in parts gives what the whole does.

        Args:
            x: the next vectors.
            before: what this gave for those before; None where there are none.
            mask: who may attend to whom, of the next vectors to all so far.
            positions: where each of the next vectors stands, for `rotary`, if not one after the other up to the end.
        """
        normed, where = self.norm(x), {} if positions is None else {"positions": positions}
        read = self.attention.keys_values(normed, **where)  # type: ignore[operator]
        read = read if before is None else before.then(read)
        return self._after(x, self.attention(normed, read, mask=mask, **where)), read

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        attended = self.dropout(attended)
        x = gates.joined(self.residual, x, attended)
        return gates.joined(self.mlp_residual, x, self.dropout(self.mlp(self.mlp_norm(x))))
