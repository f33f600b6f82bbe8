"""Heads that project every latent or decoder output with a linear layer, for example to vocabulary logits."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.registry import register


@partial(register, name="heads.Linear")
class Linear(nn.Module):
    """Head that projects every latent or decoder output from width `dim` to width `out_dim` with a linear layer.

    Example:
        >>> pc.heads.Linear(32, out_dim=3)(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 3])
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim, out_dim=out_dim)
        self.dim = dim
        self.values = init.linear(dim, out_dim)

    def forward(self, outputs: Float[Tensor, "b q d"]) -> Float[Tensor, "b q values"]:
        """Return the projected outputs."""
        return apply_linear(self.values, outputs)


@register
class Logits(nn.Module):
    """Head that projects every latent or decoder output to logits over the vocabulary of an adapter.

    Args:
        embedding: Adapter with the attributes `dim` and `vocab_size`, such as `adapters.TokenEmbedding`.

    Example:
        >>> pc.heads.Logits(pc.adapters.TokenEmbedding(vocab_size=11, dim=32))(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 11])

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `final_layer`.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.dim, vocab_size = _sizes(embedding)
        self.logits = init.linear(self.dim, vocab_size)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m vocabulary"]:
        """Return the vocabulary logits for every latent."""
        return apply_linear(self.logits, latents)


@register
class TiedLogits(nn.Module):
    """Variant of `Logits` with a weight tied to the adapter's embedding (the parameter `vectors`), and a separate bias.

    Example:
        >>> text = pc.adapters.TokenEmbedding(vocab_size=11, dim=32)
        >>> head = pc.heads.TiedLogits(text)
        >>> head(torch.randn(2, 7, 32)).shape, head.vectors is text.vectors
        (torch.Size([2, 7, 11]), True)

    Reference: Press and Wolf 2017; krasserm/perceiver-io (Perceiver AR with tied logits).
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.dim, vocab_size = _sizes(embedding)
        vectors = getattr(embedding, "vectors", None)
        if not isinstance(vectors, nn.Parameter):
            raise TypeError(
                f"embedding must have vectors to tie to; {type(embedding).__name__} has none. Use heads.Logits"
            )
        self.vectors, self.bias = vectors, nn.Parameter(torch.zeros(vocab_size))

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m vocabulary"]:
        """Return the vocabulary logits for every latent."""
        return F.linear(latents, self.vectors, self.bias)


def _sizes(embedding: nn.Module) -> tuple[int, int]:
    """Return the attributes `dim` and `vocab_size` of an adapter."""
    dim, vocab_size = getattr(embedding, "dim", None), getattr(embedding, "vocab_size", None)
    if not isinstance(dim, int) or not isinstance(vocab_size, int):
        raise TypeError(
            "embedding must have a dim and a vocab_size, as adapters.TokenEmbedding has; "
            f"got {type(embedding).__name__}"
        )
    return dim, vocab_size
