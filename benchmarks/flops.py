"""Floating point operations of the ordinary computation: every product of matrices written out, nothing kept.

A product by a weight matrix is 2 operations for each weight and each row; scores and averages of attention are
2 x queries x keys x width each. Each read makes its keys and values anew. Norms, softmax, activations and stems are
left out: they are less than a hundredth. A backward pass is two products for each one of the forward pass.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import perceiver_core as pc

BACKWARD = 3  # forward and backward together, relative to forward


def read(block: pc.CrossAttend, *, latents: int, tokens: int) -> int:
    """One read of so many tokens by so many latents, and the MLP after it."""
    return attention(block, latents=latents, tokens=tokens) + 2 * latents * _weights(block.mlp)


def attention(block: pc.CrossAttend, *, latents: int, tokens: int) -> int:
    """The read alone."""
    parts: Any = block.attention
    of_tokens = _weights(parts.key) + _weights(parts.value)
    of_latents = _weights(parts) - of_tokens
    return 2 * tokens * of_tokens + 2 * latents * of_latents + _scores(parts, latents, tokens)


def encoder(model: pc.Encoder, *, tokens: int) -> int:
    """All reads and self-attends of an encoder."""
    latents = model.latents.shape[-2]
    reads: Any = model.reads
    transformers: Any = model.transformers
    total = 0
    for read_number, transformer_number in zip(model.sharing.reads, model.sharing.transformers, strict=True):
        total += read(reads[read_number], latents=latents, tokens=tokens)
        total += transformer(transformers[transformer_number], latents=latents)
    return total


def transformer(model: pc.LatentTransformer, *, latents: int) -> int:
    """All self-attends of a latent transformer."""
    blocks: Any = model.blocks
    once = sum(2 * latents * _weights(block) + _scores(block.attention, latents, latents) for block in blocks)
    return model.num_repeats * once


def decoder(model: pc.Decoder, *, queries: int, latents: int) -> int:
    """The read of a decoder and its output."""
    return read(model.cross_attention, latents=queries, tokens=latents) + 2 * queries * _weights(model.output)


def _weights(module: nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters() if weights.ndim == 2)


def _scores(attention: Any, queries: int, keys: int) -> int:
    width: int = attention.query.out_features + attention.value.out_features
    return 2 * queries * keys * width
