"""Perceiver AR: the last tokens of a long sequence read all of it, causally, and say what comes next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core import masks
from perceiver_core.masks import Mask
from perceiver_core.blocks import CrossAttend, LatentTransformer, MultiHeadAttention, SelfAttend
from perceiver_core.heads import TiedLogits
from perceiver_core.positions import Rotary
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

ROTARY_ATTENTION = partial(MultiHeadAttention, rotary=Rotary())  # it holds nothing, so all layers may have the same
CROSS_ATTENTION = partial(CrossAttend, attention=ROTARY_ATTENTION)
LATENT_TRANSFORMER = partial(LatentTransformer, block=partial(SelfAttend, attention=ROTARY_ATTENTION))


@register
class PerceiverAR(nn.Module):
    """The next id at each of the last tokens, from all tokens up to it.

        x       = embed(ids)                            b n d
        latents = read(last m of x, x, causal)          b m d
        latents = transformer(latents, causal)          b m d
        logits  = logits(norm(latents))                 b m vocabulary

    The cost in the length of the context is that of one read. Sequences shorter than `num_latents` have a latent a
    token.

    Args:
        embedding: ids to tokens, with `dim` and `vocabulary`; see `adapters.TokenEmbedding`.
        num_latents: how many of the last tokens are latents, at most.
        depth: how many self-attends follow the read.
        num_heads: heads of these, and of nothing else.
        cross_attention: makes the cross-attend from (dim, dim), with heads of its own: one, as `CrossAttend` has unless
            told. For eight write `read=partial(perceiver_ar.CROSS_ATTENTION, heads=8)`, as below.
        latent_transformer: makes the latent transformer from (dim, depth=depth, heads=heads).
        norm: makes the norm before the logits from a width.
        head: makes what gives logits from `embedding`: `heads.TiedLogits`, `heads.Logits`, or your own.
        prefix_dropout: the share of the tokens before the latents that a sample does not read in training, drawn anew
            each time: exactly so many, rounded down.

    Unless given, `cross_attention` and `latent_transformer` turn queries and keys by their positions
    (`positions.Rotary`, all channels). Parts that do not need an `embedding` with positions.

    Raises:
        ValueError: sizes below 1, a rate outside [0, 1).

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> model = pc.PerceiverAR(pc.adapters.TokenEmbedding(vocab_size=256, dim=32), num_latents=8, depth=2, num_heads=4)
        >>> text = torch.tensor([list(b"a long context, read by its end")])
        >>> model(text).shape, model.loss(text).shape
        (torch.Size([1, 8, 256]), torch.Size([]))

    The same with four heads in the read too, as published models have:

        >>> from functools import partial
        >>> from perceiver_core.models import perceiver_ar
        >>> embed, read = pc.adapters.TokenEmbedding(vocab_size=256, dim=32), partial(perceiver_ar.CROSS_ATTENTION, num_heads=4)
        >>> pc.PerceiverAR(embed, num_latents=8, depth=2, num_heads=4, cross_attention=read).cross_attention.attention.num_heads
        4

    Reference: Hawthorne et al. 2022, "General-purpose, long-context autoregressive modeling with Perceiver AR"; prefix
    dropout as in krasserm/perceiver-io, perceiver/model/core/modules.py, `PerceiverAR`.
    """

    def __init__(  # noqa: PLR0913 (each is a number or a part of the figure)
        self,
        embedding: nn.Module,
        *,
        num_latents: int,
        depth: int = 6,
        num_heads: int = 8,
        cross_attention: Callable[..., nn.Module] = CROSS_ATTENTION,
        latent_transformer: Callable[..., nn.Module] = LATENT_TRANSFORMER,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        head: Callable[[nn.Module], nn.Module] = TiedLogits,
        prefix_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(num_latents=num_latents, num_heads=num_heads)
        checks.probability(prefix_dropout=prefix_dropout)
        self.embedding, self.num_latents, self.prefix_dropout = embedding, num_latents, prefix_dropout
        self.head = head(embedding)  # says what an adapter lacks
        self.dim: int = embedding.dim  # type: ignore[assignment]
        self.vocab_size: int = embedding.vocab_size  # type: ignore[assignment]
        self.cross_attention = cross_attention(self.dim, self.dim)
        self.latent_transformer = latent_transformer(self.dim, depth=depth, num_heads=num_heads)
        self.norm = norm(self.dim)

    def forward(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        num_latents: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b m vocabulary"]:
        """Logits of the id after each of the last m tokens.

        Args:
            ids: whole numbers.
            mask: which tokens are there, True = attend; shorter sequences are padded on the left. Where a latent is
                padding its logits mean nothing.
            num_latents: how many of the last tokens are latents; the constructor's unless given.
            generator: what prefix dropout draws from.

        Raises:
            TypeError, ValueError: ids or a mask that cannot be read; see `adapters.TokenEmbedding`.
        """
        if num_latents is not None:
            checks.positive(num_latents=num_latents)
        x, m = self.tokens(ids, mask=mask), self.num_latents if num_latents is None else num_latents
        read, allowed = self._memory(x, mask, m, generator)
        z = self.cross_attention(x[:, -m:], read, mask=allowed)
        z = self.latent_transformer(z, mask=causal(None if mask is None else mask[:, -m:]))
        return self.answer(z)

    def loss(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The cross-entropy of the last m ids, each given all before it; see `next_id_loss`.

        Args:
            ids: at least two of a sample, the last of which is read by none.
            mask: which tokens are there; padding on the left. A sample of one id alone counts nowhere.
            generator: what prefix dropout draws from.

        Raises:
            ValueError: sequences of one id, which leave nothing to foresee; a mask padded elsewhere, or that leaves
                no sample more than one.
        """
        checks.ids("ids", ids, self.vocab_size)
        if ids.shape[1] < 2:
            raise ValueError(f"ids must be at least 2 long, one to read and one to foresee; got {tuple(ids.shape)}")
        before = None
        if mask is not None:
            checks.is_mask("mask", mask, ids.shape)
            checks.padded_on_the_left("mask", mask)
            if not checks.is_true(mask[:, -2].any, mask):
                raise ValueError("mask must leave a sample 2 ids at least, one to read and one to foresee; all have 1")
            # A sample of one id has none to read: it reads padding, to give what counts nowhere.
            before = torch.cat([mask[:, :-2], torch.ones_like(mask[:, :1])], 1)
        return next_id_loss(self(ids[:, :-1], mask=before, generator=generator), ids, mask=mask)

    def tokens(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "*#b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """What is read: ids embedded, padding as zeros.

        Args:
            ids: whole numbers.
            mask: which tokens are there.
            positions: the index of each in its sequence, where these are a part of it.
        """
        where = {} if positions is None else {"positions": positions}
        made: Tokens = self.embedding(ids, mask=mask, **where)
        if mask is not None and positions is None:
            checks.padded_on_the_left("mask", mask)
        return made.materialize()

    def answer(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m vocabulary"]:
        """Logits from latents."""
        logits: Tensor = self.head(self.norm(latents))
        return logits

    def _memory(
        self, x: Tensor, mask: Tensor | None, latents: int, generator: torch.Generator | None
    ) -> tuple[Any, Mask | None]:
        """What is read, and the mask to read it with: all tokens, or keys and values of those that training keeps.

        No token behind the first latent is left out, so that "causal", counted from the end, means the same.
        """
        n = x.shape[1]
        if not self.training or not self.prefix_dropout or n <= latents:
            return x, causal(mask)
        kept = kept_of_prefix(len(x), n - latents, self.prefix_dropout, device=x.device, generator=generator)
        last = torch.arange(n - latents, n, device=x.device).expand(len(x), -1)
        at = torch.cat([kept, last], dim=1)
        present = None if mask is None else mask.gather(1, at)
        left = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        read = self.cross_attention.keys_values(  # type: ignore[operator]
            left, mask=causal(present), queries=latents, positions=at - (n - 1)
        )
        return read, None


def causal(present: Bool[Tensor, "b n"] | None) -> Mask:
    """Attend to no later position, and to no padding."""
    mask = masks.and_(masks.Causal(), None if present is None else masks.Padding(present))
    assert mask is not None
    return mask


def kept_of_prefix(
    batch: int,
    prefix: int,
    rate: float,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b kept"]:
    """For each sample which tokens of a prefix are kept when the share `rate` of them, rounded down, is left out.

    Any subset of that size is as likely as any other. Indices come in order.

    Example:
        >>> from perceiver_core.models.perceiver_ar import kept_of_prefix
        >>> kept_of_prefix(2, 7, 0.5).shape
        torch.Size([2, 4])
    """
    # Not torch.rand: with a generator it takes no sizes that torch.compile leaves open.
    order = torch.empty(batch, prefix, device=device).uniform_(generator=generator).argsort(1)
    return order[:, checks.part_of(prefix, rate) :].sort(1).values


def next_id_loss(
    logits: Float[Tensor, "b m vocabulary"],
    ids: Shaped[Tensor, "b n"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the last m ids; logits are those of all but the last id of the same sequence.

    Padding counts nowhere, nor does the first id of a sample, which nothing foretells.

    Example:
        >>> import torch
        >>> from perceiver_core.models.perceiver_ar import next_id_loss
        >>> next_id_loss(torch.zeros(2, 3, 11), torch.zeros(2, 7, dtype=torch.long))
        tensor(2.3979)
    """
    m = logits.shape[1]
    wanted = ids[:, -m:].long()
    if mask is None:
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    counted = mask[:, -m:] & mask[:, -m - 1 : -1]
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return losses.where(counted.flatten(), 0.0).sum() / counted.sum().clamp(min=1)
