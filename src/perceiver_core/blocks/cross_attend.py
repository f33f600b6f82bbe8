"""Cross-attend: an array of queries reads tokens. One read of the encoder, or the decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.attention.masks import Mask, Padding, and_, of_tokens
from perceiver_core.blocks.attention import KeysValues, MultiHeadAttention
from perceiver_core.blocks.mlp import MLP
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class CrossAttend(nn.Module):
    """x + attention(norm(x), norm(tokens)), then x + mlp(norm(x)).

    Args:
        dim: the width of the queries.
        input_dim: the width of the tokens.
        heads: attention heads; one in the paper.
        attention: makes the attention from (dim, input_dim, heads=heads); `functools.partial` of
            `MultiHeadAttention` sets the rest.
        mlp: makes the MLP from (dim).
        norm: makes a norm from a width.
        residual: whether the queries are added to what they read. Perceiver IO's decoders mostly do not.
        dropout: the rate at which what is added to the residual is dropped in training.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from perceiver_core import CrossAttend, MultiHeadAttention
        >>> read = CrossAttend(32, 10, heads=4, attention=partial(MultiHeadAttention, qk_dim=16, v_dim=24))
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1; deepmind-research/perceiver/perceiver.py, `CrossAttention`.
    """

    def __init__(
        self,
        dim: int,
        input_dim: int,
        *,
        heads: int = 1,
        attention: Callable[..., nn.Module] = MultiHeadAttention,
        mlp: Callable[[int], nn.Module] = MLP,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, input_dim=input_dim)
        checks.probability(dropout=dropout)
        self.dim, self.input_dim, self.residual = dim, input_dim, residual
        self.query_norm, self.input_norm = norm(dim), norm(input_dim)
        self.attention = attention(dim, input_dim, heads=heads)
        self.mlp_norm, self.mlp = norm(dim), mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def keys_values(
        self, tokens: Tokens | Float[Tensor, "b n c"] | KeysValues, *, mask: Mask | None = None
    ) -> KeysValues:
        """Keys and values of tokens, to read them more than once.

        Raises:
            TypeError: tokens that are not floating point, or not of the model's dtype.
            ValueError: tokens of another width, rank or device.
        """
        return self._read(tokens, mask)

    def _read(self, tokens: Tokens | Tensor | KeysValues, mask: Mask | None) -> KeysValues:
        if isinstance(tokens, KeysValues):
            return KeysValues(tokens.keys, tokens.values, and_(tokens.mask, of_tokens(mask)))
        if isinstance(tokens, Tokens):
            present = tokens.flat_mask()
            mask = and_(None if present is None else Padding(present), of_tokens(mask))
            tokens = tokens.dense()
        checks.is_floating("tokens", tokens)
        checks.has_shape("tokens", tokens, "b n c", last=self.input_dim)
        checks.same_place("tokens", tokens, next(self.parameters()))
        read: KeysValues = self.attention.keys_values(self.input_norm(tokens), mask=mask)  # type: ignore[operator]
        return read

    def forward(
        self,
        x: Float[Tensor, "b m d"],
        tokens: Tokens | Float[Tensor, "b n c"] | KeysValues,
        *,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b m d"]:
        """What the queries have become after reading.

        Args:
            x: the queries.
            tokens: what they read; keys and values where these are shared by several reads.
            mask: who may attend to whom, beside the tokens' own mask.
        """
        read = self._read(tokens, mask)
        attended = self.dropout(self.attention(self.query_norm(x), read))
        x = x + attended if self.residual else attended
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out

    def attention_map(
        self,
        x: Float[Tensor, "b m d"],
        tokens: Tokens | Float[Tensor, "b n c"] | KeysValues,
        *,
        mask: Mask | None = None,
        queries: Any = None,
    ) -> Float[Tensor, "b h chosen n"]:
        """The weights with which chosen queries attend to each token."""
        weights: Tensor = self.attention.attention_map(  # type: ignore[operator]
            self.query_norm(x), self._read(tokens, mask), queries=queries
        )
        return weights
