"""Heads of tokens: a logit for every id of a vocabulary."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import init
from perceiver_core.registry import register


@register
class Logits(nn.Module):
    """A logit for every id of a vocabulary, for every vector: a linear layer of its own.

    Args:
        embedding: the adapter whose vocabulary it is (`.dim`, `.vocabulary`); see `adapters.TokenEmbedding`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> pc.heads.Logits(pc.adapters.TokenEmbedding(vocab_size=11, dim=32))(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 11])

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `final_layer`.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.dim, vocabulary = _of_vocabulary(embedding)
        self.logits = init.linear(self.dim, vocabulary)

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m vocabulary"]:
        """One logit an id."""
        logits: Tensor = self.logits(latents)
        return logits


@register
class TiedLogits(nn.Module):
    """A logit for every id of a vocabulary, for every vector: its product with the id's vector, and a bias.

    Args:
        embedding: the adapter whose vectors these are (`.vectors`); see `adapters.TokenEmbedding`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> text = pc.adapters.TokenEmbedding(vocab_size=11, dim=32)
        >>> head = pc.heads.TiedLogits(text)
        >>> head(torch.randn(2, 7, 32)).shape, head.vectors is text.vectors
        (torch.Size([2, 7, 11]), True)

    Reference: Press and Wolf 2017; krasserm/perceiver-io ties Perceiver AR's so.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.dim, vocabulary = _of_vocabulary(embedding)
        vectors = getattr(embedding, "vectors", None)
        if not isinstance(vectors, nn.Parameter):
            raise TypeError(f"embedding must have vectors to tie to; {type(embedding).__name__} has none. Use heads.Logits")
        self.vectors, self.bias = vectors, nn.Parameter(torch.zeros(vocabulary))

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m vocabulary"]:
        """One logit an id."""
        return F.linear(latents, self.vectors, self.bias)


def _of_vocabulary(embed: nn.Module) -> tuple[int, int]:
    dim, vocabulary = getattr(embed, "dim", None), getattr(embed, "vocab_size", None)
    if not isinstance(dim, int) or not isinstance(vocabulary, int):
        raise TypeError(f"embed must have a dim and a vocabulary, as adapters.TokenEmbedding has; got {type(embed).__name__}")
    return dim, vocabulary
