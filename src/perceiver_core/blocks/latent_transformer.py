"""The latent transformer: latents attend to each other, a few blocks deep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks.attention_residual import Aggregate, onward
from perceiver_core.blocks.self_attend import SelfAttend
from perceiver_core.masks import Mask
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.registry import register


@register
class LatentTransformer(nn.Module):
    """`depth` self-attends, one after the other.

    Args:
        dim: the width of the latents.
        depth: how many blocks; 0 passes the latents on.
        num_heads: attention heads.
        block: makes a block from (dim, num_heads=num_heads); `functools.partial` of `SelfAttend` sets the rest.
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
