"""Perceiver AR: autoregressive model whose latents are the last tokens of a long sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, masks, tracing
from perceiver_core.adapters import TokenEmbedding
from perceiver_core.blocks import CrossAttend, LatentTransformer, MultiHeadAttention, SelfAttend
from perceiver_core.blocks.factory import build
from perceiver_core.heads import TiedLogits
from perceiver_core.layers.random_draws import RepeatableDraws
from perceiver_core.masks import Mask
from perceiver_core.models.causality import check_causal
from perceiver_core.positions.rotary import Rotary
from perceiver_core.registry import register

ROTARY_ATTENTION = partial(MultiHeadAttention, rotary=Rotary())
CROSS_ATTENTION = partial(CrossAttend, attention=ROTARY_ATTENTION)
LATENT_TRANSFORMER = partial(LatentTransformer, block=partial(SelfAttend, attention=ROTARY_ATTENTION))
IGNORED = -100  # label of tokens that the loss ignores, as in PyTorch and transformers


class DecodingStep(NamedTuple):
    """Inputs for one forward pass of generation with caches.

    Args:
        indices: Sequence index of each token in this pass, `n` or `b n`, for position embeddings.
        num_new: Number of new tokens: the last tokens, whose cross-attention keys and values are not cached yet.
        cross_attention: Keyword arguments of the cross-attention: mask, rotary positions and cache.
        latent_transformer: Keyword arguments of the latent transformer: mask, rotary positions and caches.
    """

    indices: Int[Tensor, "*#b n"]
    num_new: int
    cross_attention: dict[str, Any]
    latent_transformer: dict[str, Any]


@register
class PerceiverAR(nn.Module):
    """Perceiver AR: autoregressive model in which only the last tokens attend, causally, to the whole sequence.

        x       = embedding(ids)                                    b n d
        latents = cross_attention(last m of x, x, causal)           b m d
        latents = latent_transformer(latents, causal)               b m d
        logits  = head(norm(latents))                               b m vocab_size

    The last m tokens become the latents, where m is at most `num_latents`. The tokens before them (the prefix) are used
    only by the embedding and the cross-attention, so the latent transformer does not get slower with a longer prefix.

    Args:
        embedding: Adapter for token ids with attributes `dim` and `vocab_size`; see `adapters.TokenEmbedding`.
        num_latents: Maximum number of latents.
        depth: Number of self-attention blocks in the latent transformer.
        num_heads: Number of attention heads in these blocks.
        cross_attention: Factory `(dim, dim) -> module`. The default has one attention head. For eight heads, pass
            `partial(perceiver_ar.CROSS_ATTENTION, num_heads=8)`.
        latent_transformer: Factory `(dim, depth=depth, num_heads=num_heads) -> module`.
        norm: Factory `dim -> module` of the norm before the head.
        head: Factory `embedding -> module` of the output layer, such as `heads.TiedLogits` or `heads.Logits`.
        prefix_dropout: Fraction of the prefix tokens to drop in training, in [0, 1). The number of dropped tokens is
            rounded down. Each forward pass draws the dropped tokens at random for each sample.

    The default `cross_attention` and `latent_transformer` apply rotary embeddings to all channels of queries and keys
    (`positions.Rotary`). Factories without rotary embeddings, such as `CrossAttend`, need an `embedding` that adds
    positions.

    Raises:
        TypeError: If `embedding` lacks an attribute that the head needs.
        ValueError: If a size or `prefix_dropout` is out of range, or the heads do not fit their rotary embeddings.
        ValueError: If `cross_attention` has `Rotary(from_end=False)`, or a kernel is not causal (`kernels.inverted`).

    Example:
        >>> embedding = pc.adapters.TokenEmbedding(vocab_size=256, dim=32)
        >>> model = pc.PerceiverAR(embedding, num_latents=8, depth=2, num_heads=4)
        >>> ids = torch.tensor([list(b"the last eight bytes are latents")])
        >>> model(ids).shape, model.loss(ids).shape
        (torch.Size([1, 8, 256]), torch.Size([]))

    Reference: Hawthorne et al. 2022, "General-purpose, long-context autoregressive modeling with Perceiver AR". Prefix
    dropout: krasserm/perceiver-io, perceiver/model/core/modules.py, `PerceiverAR`.
    """

    def __init__(  # noqa: PLR0913 (sizes and components of the architecture)
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
        self.head = build("head", head, embedding)  # raises if the embedding has no dim or vocab_size
        self.dim, self.vocab_size = cast(TokenEmbedding, embedding).dim, cast(TokenEmbedding, embedding).vocab_size
        self.cross_attention = build("cross_attention", cross_attention, self.dim, self.dim)
        sizes = {"depth": depth, "num_heads": num_heads}
        self.latent_transformer = build("latent_transformer", latent_transformer, self.dim, **sizes)
        check_causal(cross_attention=self.cross_attention, latent_transformer=self.latent_transformer)
        self.norm, self._draws = build("norm", norm, self.dim), RepeatableDraws()

    def forward(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        num_latents: int | None = None,
        generator: torch.Generator | None = None,
        labels: Shaped[Tensor, "b n"] | None = None,
        step: DecodingStep | None = None,
    ) -> Float[Tensor, "b m vocab_size"] | Float[Tensor, ""]:
        """Return the next-token logits at each of the last m tokens (the latents), or the loss if `labels` are passed.

        Args:
            ids: Token ids.
            mask: Mask of valid tokens, True = attend. Pad shorter sequences on the left, and ignore the logits at
                padding.
            num_latents: Maximum number of latents in this pass; None for the model's `num_latents`.
            generator: Random generator for prefix dropout.
            labels: Token ids to predict, usually `ids` itself; -100 for tokens that the loss ignores, such as a prompt.
                Label i is predicted from the tokens before position i, so the last token is not an input. The output
                is the mean cross-entropy of all latents; see `loss`.
            step: Caches and other inputs for one step of `generate`. If set, `ids` contains only the last tokens of the
                sequence, and only the logits at the last token are returned.

        Raises:
            TypeError, ValueError: If the ids or the mask are invalid; see `adapters.TokenEmbedding`.
            TypeError: If the labels are not integers.
            ValueError: If the labels do not have the shape of `ids`, a label is neither in the vocabulary nor -100, or
                there are fewer than two ids per sample.
        """
        targets = None
        if labels is not None:
            ids, mask, targets = self._inputs_and_targets(ids, mask, labels)
        m = self.num_latents if num_latents is None else num_latents
        checks.positive(num_latents=m)
        options = {} if step is None else {"positions": step.indices}
        x = self.embedding(ids, mask=mask, **options).materialize()  # zero at masked tokens
        if step is not None:
            latents = self.cross_attention(x[:, -m:], x[:, -step.num_new :], **step.cross_attention)
            latents = self.latent_transformer(latents, **step.latent_transformer)
            return self.head(self.norm(latents[:, -1:]))
        if mask is not None:
            checks.padded_on_the_left("mask", mask)
        tokens, valid, positions = self._drop_prefix(x, mask, m, generator)
        options = {} if positions is None else {"token_positions": positions}
        latents = self.cross_attention(last(x, m), tokens, mask=causal(valid), **options)
        latents = self.latent_transformer(latents, mask=causal(None if mask is None else last(mask, m)))
        logits = self.head(self.norm(latents))
        return logits if targets is None else _mean_loss(logits, targets)

    def loss(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean cross-entropy of the next-token predictions of all latents.

        This is `model(ids, labels=ids)`. If the model is wrapped, for example by DistributedDataParallel, use this form
        instead, because the wrapper handles calls of the model, but not of its methods.

        Args:
            ids: Token ids, at least two per sample. The last token is only a target, not an input.
            mask: Mask of valid tokens, True = attend. Pad shorter sequences on the left. Samples with only one valid
                token are ignored.
            generator: Random generator for prefix dropout.

        Raises:
            TypeError: If the ids are not integers, or the mask is not boolean.
            ValueError: If there are fewer than two ids per sample, or an id is not in the vocabulary.
            ValueError: If the mask has the wrong shape, has padding that is not on the left, or has no sample with two
                valid tokens.
        """
        return self(ids, mask=mask, generator=generator, labels=ids)

    def _inputs_and_targets(
        self, ids: Tensor, mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the ids and the mask without the last token, and the target of each of these tokens."""
        checks.ids("ids", ids, self.vocab_size)
        if ids.shape[1] < 2:
            raise ValueError(f"ids must be at least 2 long, an input and a target; got {tuple(ids.shape)}")
        if labels is not ids:
            labels = checks.whole_numbers("labels", labels)  # -100 cannot be represented in uint8
            if labels.shape != ids.shape:
                raise ValueError(f"labels must have the shape of ids, {tuple(ids.shape)}; got {tuple(labels.shape)}")
            checks.ids("labels", labels.masked_fill(labels == IGNORED, 0), self.vocab_size)
        targets = labels[:, 1:].long()
        if mask is None:
            return ids[:, :-1], None, targets
        checks.is_mask("mask", mask, ids.shape)
        checks.padded_on_the_left("mask", mask)
        if not checks.is_true(mask[:, -2].any, mask):
            raise ValueError("mask must leave at least 2 tokens, an input and a target, in one sample; all have fewer")
        # A sample with one valid token has a target but no valid input. Its last padding token is unmasked, because
        # every sample needs a token to attend to, and the loss ignores the prediction.
        input_mask = torch.cat([mask[:, :-2], torch.ones_like(mask[:, :1])], 1)
        return ids[:, :-1], input_mask, targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)

    def _drop_prefix(
        self, x: Tensor, mask: Tensor | None, num_latents: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Apply prefix dropout. Return the kept tokens, their mask, and their rotary positions.

        The positions are None if dropout is inactive. Tokens that become latents are never dropped. A causal mask is
        therefore still correct, because it aligns the last query with the last key.
        """
        n = x.shape[1]
        if not self.training or not self.prefix_dropout or n <= num_latents:
            return x, mask, None
        draw = self._draws.generator(generator)
        prefix = kept_prefix(len(x), n - num_latents, self.prefix_dropout, device=x.device, generator=draw)
        last = torch.arange(n - num_latents, n, device=x.device).expand(len(x), -1)
        kept = torch.cat([prefix, last], dim=1)
        tokens = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return tokens, None if mask is None else mask.gather(1, kept), kept - (n - 1)


def last(x: Shaped[Tensor, "b n *d"], count: int) -> Shaped[Tensor, "b m *d"]:
    """Return the last `count` tokens, or all tokens if there are fewer.

    An exported program gathers them by index: a slice would restrict it to inputs that are longer than `count`, or to
    inputs that are not, depending on the example input.
    """
    if not tracing.is_exporting():
        return x[:, -count:]
    n = x.shape[1]
    return x.index_select(1, torch.arange(torch.sym_max(n - count, 0), n, device=x.device))  # type: ignore[no-untyped-call]


def causal(valid: Bool[Tensor, "b n"] | None) -> Mask:
    """Return a causal mask. If `valid` is not None, combine it by logical and with the key-padding mask `valid`."""
    return masks.Causal() if valid is None else masks.And((masks.Causal(), masks.Padding(valid)))


def kept_prefix(
    batch: int,
    prefix: int,
    rate: float,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b kept"]:
    """Return sorted indices of the prefix tokens to keep, drawn at random for each of `batch` samples.

    Of the `prefix` tokens of a sample, `rate * prefix`, rounded down, are dropped. All subsets of that size are equally
    likely.
    """
    # torch.rand with a generator does not support dynamic sizes under torch.compile.
    order = torch.empty(batch, prefix, device=device).uniform_(generator=generator).argsort(1)
    return order[:, checks.part_of(prefix, rate) :].sort(1).values


def next_token_loss(
    logits: Float[Tensor, "b m vocab_size"],
    ids: Shaped[Tensor, "b n"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy between the logits for the last m tokens and the ids of these tokens.

    The logits for a token must be computed from the tokens before it. Masked tokens are ignored. With a mask, the first
    valid token of each sample is also ignored, because it has no context.

    Example:
        >>> from perceiver_core.models.perceiver_ar import next_token_loss
        >>> next_token_loss(torch.zeros(2, 3, 11), torch.zeros(2, 7, dtype=torch.long))
        tensor(2.3979)
    """
    m = logits.shape[1]
    targets = ids[:, -m:].long()
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, -m:] & mask[:, -m - 1 : -1]), IGNORED)
    return _mean_loss(logits, targets)


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the last targets. Ignored targets do not count; if all are ignored, return 0."""
    targets = targets[:, -logits.shape[1] :].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="none")
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32))  # a sum may overflow float16
    return wide.sum() / (targets != IGNORED).sum().clamp(min=1)
