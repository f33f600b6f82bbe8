"""Cross-attend: an array of queries reads tokens. One read of the encoder, or the decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.reads.factored import FactoredKeysValues
from perceiver_core.masks import Mask
from perceiver_core.blocks import gates
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.reads.costs import Request
from perceiver_core.blocks.gates import Residual
from perceiver_core.blocks.mlp import MLP
from perceiver_core.reads import Auto, Strategy, check_strategy
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class CrossAttend(nn.Module):
    """x + attention(norm(x), norm(tokens)), then x + mlp(norm(x)).

    Args:
        dim: the width of the queries.
        input_dim: the width of the tokens.
        num_heads: attention heads; one in the paper.
        attention: makes the attention from (dim, input_dim, heads=heads); `functools.partial` of
            `MultiHeadAttention` sets the rest.
        mlp: makes the MLP from (dim); None for none.
        norm: makes a norm from a width.
        residual: whether the queries are added to what they read, which Perceiver IO's decoders mostly do not; or what
            makes a gate in place of the sum from (dim), such as `GRUGate`.
        mlp_residual: the same of what the MLP gives.
        dropout: the rate at which what is added to the residual is dropped in training.
        strategy: how tokens are read; see `paths`. All paths give the same answer.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from perceiver_core import CrossAttend, MultiHeadAttention
        >>> read = CrossAttend(32, 10, num_heads=4, attention=partial(MultiHeadAttention, qk_dim=16, v_dim=24))
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1; deepmind-research/perceiver/perceiver.py, `CrossAttention`.
    """

    changes_no_result = ("strategy",)

    def __init__(  # noqa: PLR0913 (each is a part or a choice that published models make differently)
        self,
        dim: int,
        input_dim: int,
        *,
        num_heads: int = 1,
        attention: Callable[..., nn.Module] = MultiHeadAttention,
        mlp: Callable[[int], nn.Module] | None = MLP,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        residual: Residual = True,
        mlp_residual: Residual = True,
        dropout: float = 0.0,
        strategy: Strategy = Auto(),  # noqa: B008 (it is a constant)
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, input_dim=input_dim)
        check_strategy(strategy)
        checks.probability(dropout=dropout)
        self.dim, self.input_dim, self.strategy = dim, input_dim, strategy
        self.residual = gates.made(residual, dim)
        self.mlp_residual = True if mlp is None else gates.made(mlp_residual, dim)
        self.query_norm, self.input_norm = norm(dim), norm(input_dim)
        self.attention = attention(dim, input_dim, num_heads=num_heads)
        self.mlp_norm = None if mlp is None else norm(dim)
        self.mlp = None if mlp is None else mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def keys_values(
        self,
        tokens: Tokens | Float[Tensor, "b n c"],
        *,
        mask: Mask | None = None,
        queries: int = 512,
        positions: Shaped[Tensor, "*#b n"] | None = None,
    ) -> KeysValues | FactoredKeysValues:
        """Keys and values of tokens, to read them more than once.

        Args:
            tokens: what is read.
            mask: who may attend to whom, beside the tokens' own mask.
            queries: how many will read them, over all reads; what is quickest depends on it.
            positions: where each token stands, for `rotary`, if not one after the other up to the end.

        Raises:
            TypeError: tokens that are not floating point, or not of the model's dtype.
            ValueError: tokens of another width, rank or device.
        """
        return self.strategy.read(self.request(tokens, mask=mask, queries=queries, positions=positions))

    def request(
        self,
        tokens: Tokens | Float[Tensor, "b n c"],
        *,
        mask: Mask | None = None,
        queries: int = 512,
        positions: Tensor | None = None,
    ) -> Request:
        """What `path` is asked for."""
        x = tokens.content if isinstance(tokens, Tokens) else tokens
        checks.is_floating("tokens", x)
        if isinstance(tokens, Tokens):
            if tokens.dim != self.input_dim:
                raise ValueError(
                    f"tokens must be {self.input_dim} wide, content and positions together; got {tokens.dim} "
                    f"({x.shape[-1]} of content)"
                )
        else:
            checks.has_shape("tokens", x, "b n c", last=self.input_dim)
        checks.same_place("tokens", x, next(self.parameters()))
        return Request(self.input_norm, self.attention, tokens, mask, queries, positions)

    def _read(self, x: Tensor, tokens: Any, mask: Mask | None) -> tuple[Any, Mask | None]:
        """What the attention reads, and the mask that is not in it yet."""
        if isinstance(tokens, (KeysValues, FactoredKeysValues)):
            return tokens, mask
        return self.strategy.read(self.request(tokens, mask=mask, queries=x.shape[1])), None

    def forward(
        self,
        x: Float[Tensor, "#b m d"],
        tokens: Tokens | Float[Tensor, "b n c"] | KeysValues | FactoredKeysValues,
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """What the queries have become after reading.

        Args:
            x: the queries; a batch of one asks the same of all samples.
            tokens: what they read; keys and values where these are shared by several reads.
            mask: who may attend to whom, beside the tokens' own mask.
            positions: where each query stands, for `rotary`, if not one after the other up to the end.
        """
        read, mask = self._read(x, tokens, mask)
        where = {} if positions is None else {"positions": positions}  # a user's own attention need not know of them
        attended = self.dropout(self.attention(self.query_norm(x), read, mask=mask, **where))
        x = gates.joined(self.residual, x, attended)
        if self.mlp is None or self.mlp_norm is None:
            return x
        return gates.joined(self.mlp_residual, x, self.dropout(self.mlp(self.mlp_norm(x))))

    def attention_map(
        self,
        x: Float[Tensor, "#b m d"],
        tokens: Tokens | Float[Tensor, "b n c"] | KeysValues | FactoredKeysValues,
        *,
        mask: Mask | None = None,
        queries: Any = None,
    ) -> Float[Tensor, "b h chosen n"]:
        """The weights with which chosen queries attend to each token."""
        read, mask = self._read(x, tokens, mask)
        weights: Tensor = self.attention.attention_map(  # type: ignore[operator]
            self.query_norm(x), read, mask=mask, queries=queries
        )
        return weights
