"""Latent transformer: a sequence of self-attention blocks on the latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks.attention_residual import Aggregate
from perceiver_core.blocks.factory import build
from perceiver_core.blocks.self_attend import SelfAttend
from perceiver_core.masks import Mask
from perceiver_core.reads.caches import Cache
from perceiver_core.registry import register


@register
class LatentTransformer(nn.Module):
    """Sequence of `depth` self-attention blocks.

    Args:
        dim: Width of the latents.
        depth: Number of blocks; 0 for the identity.
        num_heads: Number of attention heads.
        block: Factory `(dim, num_heads=num_heads) -> module`. Use `functools.partial(SelfAttend, ...)` to set other
            options.
        num_repeats: Number of passes through the blocks, with the same weights each time.
        aggregate: Factory `dim -> module`, such as `AttentionResidual`. After each block, the module combines the
            initial latents and the outputs of all blocks so far into the new latents. None to use only the output of
            the last block.

    Raises:
        ValueError: If `depth` is outside 0 ... 10,000 or `num_repeats` is outside 1 ... 10,000.

    Example:
        >>> from functools import partial
        >>> block = partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=4, activation=pc.GEGLU()))
        >>> pc.LatentTransformer(32, depth=3, num_heads=4, block=block)(torch.randn(2, 5, 32)).shape
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
        self.blocks = nn.ModuleList(build("block", block, dim, num_heads=num_heads) for _ in range(depth))
        self.aggregates = (
            None if aggregate is None else nn.ModuleList(build("aggregate", aggregate, dim) for _ in range(depth))
        )

    @property
    def num_layers(self) -> int:
        """Number of blocks that the latents pass through, including repeats."""
        return len(self.blocks) * self.num_repeats

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents after all blocks.

        Args:
            x: Latents.
            mask: Attention mask. With caches, it must also cover the cached keys.
            positions: Positions for rotary embeddings; by default consecutive, with 0 for the last latent. With rotary
                embeddings, caches require explicit positions.
            caches: Key-value caches (`reads.KeysValuesCache`), one for each of the `num_layers` layers.

        Example:
            >>> transformer, x = pc.LatentTransformer(32, depth=2, num_heads=4), torch.randn(1, 5, 32)
            >>> caches = [pc.reads.KeysValuesCache() for _ in range(transformer.num_layers)]
            >>> first = transformer(x[:, :4], mask=pc.masks.Causal(), caches=caches)
            >>> last = transformer(x[:, 4:], caches=caches)
            >>> torch.testing.assert_close(torch.cat([first, last], 1), transformer(x, mask=pc.masks.Causal()))
        """
        options: dict[str, object] = {} if positions is None else {"positions": positions}
        if caches is not None and len(caches) != self.num_layers:
            raise ValueError(f"caches must be one for each of {self.num_layers} layers; got {len(caches)}")
        states = [x]
        for layer, number in enumerate(list(range(len(self.blocks))) * self.num_repeats):
            if caches is not None:
                options["cache"] = caches[layer]
            x = self.blocks[number](x, mask=mask, **options)
            if self.aggregates is not None:
                states = [*states, x]  # a new list, because activation checkpointing keeps the arguments
                x = self.aggregates[number](states)
        return x
