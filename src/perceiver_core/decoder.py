"""Decoder of Perceiver IO: output queries cross-attend to the latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_core import checks, masks, modalities, tracing
from perceiver_core.blocks import CrossAttend
from perceiver_core.blocks.factory import build
from perceiver_core.kernels.attention_weights import unwrapped
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.reads import AttentionCapture
from perceiver_core.registry import register

Queries = TypeVar("Queries", Tensor, dict[str, Tensor])


@register
class Decoder(nn.Module):
    """Perceiver IO decoder: cross-attention from any number of queries to the latents, followed by a linear layer.

        outputs = output(cross_attention(queries, latents))

    Args:
        dim: Width of the latents.
        query_dim: Width of the queries.
        out_dim: Width of the outputs; None to omit the linear layer, so that the outputs have width `query_dim`.
        num_heads: Number of attention heads.
        cross_attention: Factory `(query_dim, dim, num_heads=num_heads) -> module`, for example
            `partial(CrossAttend, residual=False, mlp=None)` to omit the MLP. The default is `CrossAttend` with
            `residual=False`: the queries are not added to the attention output. DeepMind's published decoders do not
            add them either, except in the image classifiers with Fourier features and with convolutional preprocessing.
        chunk_size: Number of queries to decode at a time; None to decode all queries at once. With gradients enabled,
            each chunk is recomputed in the backward pass, so only the queries and outputs are stored. `torch.func`
            transforms cannot differentiate through this recomputation.

    Raises:
        ValueError: If a size is below 1.
        ValueError: If `chunk_size` is set and the attention kernel takes the softmax over the queries, so that the
            queries cannot be split into chunks (`kernels.inverted`).

    Example:
        >>> decoder = pc.Decoder(32, query_dim=20, out_dim=2)
        >>> decoder(torch.randn(3, 7, 32), torch.randn(3, 100, 20)).shape
        torch.Size([3, 100, 2])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2 and figure 2.
    """

    def __init__(
        self,
        dim: int,
        *,
        query_dim: int,
        out_dim: int | None = None,
        num_heads: int = 1,
        cross_attention: Callable[..., nn.Module] = partial(CrossAttend, residual=False),  # noqa: B008 (constant)
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        options = {"out_dim": out_dim, "chunk_size": chunk_size}
        checks.positive(dim=dim, query_dim=query_dim, **{k: size for k, size in options.items() if size is not None})
        self.dim, self.query_dim, self.chunk_size = dim, query_dim, chunk_size
        self.out_dim = query_dim if out_dim is None else out_dim
        self.cross_attention = build("cross_attention", cross_attention, query_dim, dim, num_heads=num_heads)
        self.output = nn.Identity() if out_dim is None else init.linear(query_dim, out_dim)
        if chunk_size is not None and _queries_compete(self.cross_attention):
            raise ValueError(f"chunk_size must be None where queries compete for tokens; got {chunk_size}")

    def forward(
        self,
        latents: Float[Tensor, "b m d"],
        queries: Queries,
        *,
        mask: Tensor | Mapping[str, Tensor] | None = None,
        capture: AttentionCapture | None = None,
    ) -> Queries:
        """Return one output per query, `b q o`, or a dictionary of outputs if the queries are a dictionary.

        Args:
            latents: Latents.
            queries: Queries `b q e`, or `1 q e` or `q e` to use the same queries for all samples. To decode several
                modalities, a dictionary of such tensors, keyed by modality.
            mask: Mask of valid queries `b q`, True = decode, or a dictionary of such masks if the queries are a
                dictionary. Masked queries attend to no latent. In a modality without a mask, all queries are valid.
            capture: Container that stores the attention weights. If set, all queries are decoded at once.

        Raises:
            TypeError: If latents or queries are not floating point, or do not have the model's dtype.
            TypeError: If the mask is not boolean, or only one of `queries` and `mask` is a dictionary.
            ValueError: If latents or queries have the wrong shape or device, or the mask has the wrong shape.
        """
        checks.is_floating("latents", latents)
        checks.has_shape("latents", latents, "b m d", last=self.dim)
        if isinstance(queries, dict):
            joined, sizes = _join(latents, queries)
            joined_mask = None if mask is None else _join_masks(mask, queries, latents, sizes)
            outputs = self._decode(latents, joined, joined_mask, capture)
            return dict(zip(queries, torch.split(outputs, sizes, dim=1), strict=True))
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a boolean tensor b q, as the queries are a tensor; got {mask!r:.80}")
        return self._decode(latents, queries, mask, capture)

    def attention_map(
        self,
        latents: Float[Tensor, "b m d"],
        queries: Queries,
        *,
        mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Queries:
        """Return the attention weights of all queries, `b h q m`.

        If the queries are a dictionary, return a dictionary of weights, keyed by modality.

        Args:
            latents: Same as in `forward`.
            queries: Same as in `forward`.
            mask: Same as in `forward`. The weights of masked queries are zero.

        Raises:
            TypeError, ValueError: Same as in `forward`.

        Example:
            >>> decoder = pc.Decoder(32, query_dim=20, num_heads=4)
            >>> decoder.attention_map(torch.randn(3, 7, 32), torch.randn(5, 20)).shape
            torch.Size([3, 4, 5, 7])
        """
        capture = AttentionCapture()
        outputs = self(latents, queries, mask=mask, capture=capture)
        if not isinstance(queries, dict):
            return capture.result()
        sizes = [x.shape[1] for x in outputs.values()]
        return dict(zip(queries, torch.split(capture.result(), sizes, dim=2), strict=True))

    def _decode(
        self, latents: Tensor, queries: Tensor, mask: Tensor | None, capture: AttentionCapture | None
    ) -> Tensor:
        """Check the queries and decode them, all at once or in chunks."""
        checks.is_floating("queries", queries)
        queries = _batched(queries)
        checks.has_shape("queries", queries, "b q e", last=self.query_dim)
        attention = getattr(self.cross_attention, "attention", None)
        checks.matches_weight("queries", queries, getattr(attention, "query", None))
        checks.matches_weight("latents", latents, getattr(attention, "key", None))
        if queries.shape[0] not in (1, latents.shape[0]):
            raise ValueError(
                f"queries must have batch size 1 or that of the latents, {latents.shape[0]}; got {queries.shape[0]}"
            )
        if mask is not None:
            checks.is_mask("mask", mask, (latents.shape[0], queries.shape[1]))
        # An exported program decodes all queries at once: a number of chunks could not depend on dynamic sizes.
        chunk_size = None if tracing.is_exporting() else self.chunk_size
        if chunk_size is None or queries.shape[1] <= chunk_size or capture is not None:
            return self._decode_chunk(latents, queries, mask, capture)
        chunks = torch.split(queries, chunk_size, dim=1)
        chunk_masks = [None] * len(chunks) if mask is None else torch.split(mask, chunk_size, dim=1)
        decode: Callable[..., Tensor] = self._decode_chunk
        if torch.is_grad_enabled() and not tracing.transformed():  # torch.func does not support checkpointing
            decode = partial(checkpoint, self._decode_chunk, use_reentrant=False)
        return torch.cat([decode(latents, *chunk) for chunk in zip(chunks, chunk_masks, strict=True)], dim=1)

    def _decode_chunk(
        self, latents: Tensor, queries: Tensor, mask: Tensor | None, capture: AttentionCapture | None = None
    ) -> Tensor:
        options = {} if capture is None else {"capture": capture}
        allowed = None if mask is None else masks.Queries(mask)
        return apply_linear(self.output, self.cross_attention(queries, latents, mask=allowed, **options))


def _queries_compete(cross_attention: nn.Module) -> bool:
    kernel = getattr(getattr(cross_attention, "attention", None), "kernel", None)
    return bool(getattr(unwrapped(kernel), "competes", False))


def _join(latents: Tensor, queries: Mapping[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Concatenate the queries of all modalities. Return the result `#b q e` and the number of queries per modality."""
    if not queries:
        raise ValueError("queries must name a tensor at least; got an empty dictionary")
    for name, x in queries.items():
        checks.is_floating(f"queries[{name!r}]", x)
    parts = {name: _batched(x) for name, x in queries.items()}
    batch = latents.shape[0] if any(x.shape[0] != 1 for x in parts.values()) else 1
    for name, x in parts.items():
        if x.shape[0] not in (1, batch):
            raise ValueError(
                f"queries[{name!r}] must have batch size 1 or that of the latents, {batch}; got {x.shape[0]}"
            )
    joined = torch.cat([x.expand(batch, -1, -1) for x in parts.values()], dim=1)
    return joined, [x.shape[1] for x in parts.values()]


def _join_masks(
    mask: Tensor | Mapping[str, Tensor], queries: Mapping[str, Tensor], latents: Tensor, sizes: list[int]
) -> Tensor:
    """Return the concatenated query masks of all modalities, `b q`. A missing mask counts as True for all queries."""
    modalities.check_names("mask", mask, queries)
    assert isinstance(mask, Mapping)
    parts = []
    for name, size in zip(queries, sizes, strict=True):
        shape = (latents.shape[0], size)
        if name in mask:
            checks.is_mask(f"mask[{name!r}]", mask[name], shape)
        parts.append(mask[name] if name in mask else latents.new_ones(shape, dtype=torch.bool))
    return torch.cat(parts, dim=1)


def _batched(queries: Tensor) -> Tensor:
    return queries[None] if queries.ndim == 2 else queries
