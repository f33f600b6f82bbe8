"""The latent transformer: latents attend to each other, a few blocks deep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.masks import Mask
from perceiver_core.blocks import gates
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.blocks.attention_residual import Aggregate, onward
from perceiver_core.blocks.gates import Residual
from perceiver_core.blocks.mlp import MLP
from perceiver_core.registry import register


@register
class SelfAttend(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: the width of the array.
        num_heads: attention heads.
        attention: makes the attention from (dim, heads=heads).
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


@register
class LatentTransformer(nn.Module):
    """`depth` self-attends, one after the other.

    Args:
        dim: the width of the latents.
        depth: how many blocks; 0 passes the latents on.
        num_heads: attention heads.
        block: makes a block from (dim, heads=heads); `functools.partial` of `SelfAttend` sets the rest.
        num_repeats: how often the blocks are gone through, with the same weights each time.
        aggregate: makes, for each block, from (dim), what goes on from the latents before and after all blocks so far,
            such as `AttentionResidual`; unless given, those after the last go on.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from perceiver_core import GEGLU, LatentTransformer, MLP, SelfAttend
        >>> block = partial(SelfAttend, mlp=partial(MLP, widening_factor=4, activation=GEGLU()))
        >>> LatentTransformer(32, depth=3, num_heads=4, block=block)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1; repeats: Jaegle et al. 2022 (Perceiver IO), appendix E.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        num_heads: int = 8,
        block: Callable[..., nn.Module] = SelfAttend,
        num_repeats: int = 1,
        aggregate: Aggregate | None = None,
    ) -> None:
        super().__init__()
        checks.positive(at_most=10_000, num_repeats=num_repeats)
        self.num_repeats = num_repeats
        if not 0 <= depth <= 10_000:
            raise ValueError(f"depth must lie in 0 ... 10,000; got {depth}")
        self.blocks = nn.ModuleList(block(dim, num_heads=num_heads) for _ in range(depth))
        self.aggregates = [None] * depth if aggregate is None else nn.ModuleList(aggregate(dim) for _ in range(depth))

    def forward(self, x: Float[Tensor, "b m d"], *, mask: Mask | None = None) -> Float[Tensor, "b m d"]:
        """The latents after every block."""
        past = [x]
        for _ in range(self.num_repeats):
            for block, pool in zip(self.blocks, self.aggregates, strict=True):
                x = onward(pool, past, block(x, mask=mask))
        return x

    def extend(
        self,
        x: Float[Tensor, "b m d"],
        before: Sequence[KeysValues] | None,
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
    ) -> tuple[Float[Tensor, "b m d"], list[KeysValues]]:
        """The latents go on: what the next ones become, and for every block what later ones have to know.

        Args are those of `SelfAttend.extend`, `before` being a list of one for each block, time after time.

        Example:
            >>> import torch
            >>> from perceiver_core import LatentTransformer
            >>> from perceiver_core import masks
            >>> transformer, x = LatentTransformer(32, depth=2, num_heads=4), torch.randn(1, 5, 32)
            >>> first, known = transformer.extend(x[:, :4], None, mask=masks.Causal())
            >>> last, known = transformer.extend(x[:, 4:], known)
            >>> torch.testing.assert_close(torch.cat([first, last], 1), transformer(x, mask=masks.Causal()))
        """
        known, past = [], [x]
        for number, block in enumerate([*self.blocks] * self.num_repeats):
            x, read = block.extend(x, None if before is None else before[number], mask=mask, positions=positions)
            x = onward(self.aggregates[number % len(self.aggregates)], past, x)
            known.append(read)
        return x, known
