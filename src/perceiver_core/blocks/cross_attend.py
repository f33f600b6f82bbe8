"""Cross-attention block of encoders and decoders: queries attend to tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks, masks
from perceiver_core.blocks import gates
from perceiver_core.blocks.factory import build, takes_argument
from perceiver_core.blocks.gates import Residual
from perceiver_core.blocks.mlp import MLP
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.masked_values import finite_where_masked, without_masked_tokens
from perceiver_core.masks import Mask
from perceiver_core.reads import Auto, ReadContext, Source, Strategy, check_strategy
from perceiver_core.reads.automatic import with_norm_output
from perceiver_core.reads.caches import AttentionCapture, Cache
from perceiver_core.reads.strategy import Attention, AttentionInput
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class CrossAttend(nn.Module):
    """Pre-norm cross-attention block: x + attention(norm(x), norm(tokens)), then x + mlp(norm(x)).

    Args:
        dim: Width of the queries.
        input_dim: Width of the tokens.
        num_heads: Number of attention heads; 1 in the paper.
        attention: Factory `(dim, input_dim, num_heads=num_heads) -> module`. Use
            `functools.partial(MultiHeadAttention, ...)` to set other options. A custom module is called as
            `module(x, inputs, mask=mask)` with the normalized queries and tokens.
        mlp: Factory `dim -> module`; None for no MLP.
        norm: Factory `width -> module` for the three norms: of the queries, of the tokens and before the MLP.
        residual: True to add the queries to the attention output, False for the attention output alone (as in most
            Perceiver IO decoders), or a factory `dim -> module` for a gate that replaces the sum, such as `GRUGate`.
        mlp_residual: Same as `residual`, but for the MLP.
        dropout: Dropout rate of the attention output and the MLP output.
        strategy: Method to compute the attention; see `reads`. All strategies give the same result.

    Example:
        >>> from functools import partial
        >>> read = pc.CrossAttend(32, 10, num_heads=4, attention=partial(pc.MultiHeadAttention, qk_dim=16, v_dim=24))
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])

    Reference: Jaegle et al. 2021 (Perceiver), section 3.1; deepmind-research/perceiver/perceiver.py, `CrossAttention`.
    """

    changes_no_result = ("strategy",)
    accepts_cache = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.accepts_cache = takes_argument(cls.forward, "cache")

    def __init__(  # noqa: PLR0913 (published models differ in each of them)
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
        self.residual = gates.from_option("residual", residual, dim)
        self.mlp_residual = True if mlp is None else gates.from_option("mlp_residual", mlp_residual, dim)
        self.query_norm, self.input_norm = build("norm", norm, dim), build("norm", norm, input_dim)
        self.attention = build("attention", attention, dim, input_dim, num_heads=num_heads)
        self.mlp_norm = None if mlp is None else build("norm", norm, dim)
        self.mlp = None if mlp is None else build("mlp", mlp, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "#b m d"],
        tokens: Tokens | Float[Tensor, "b n c"] | AttentionInput,
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
        token_positions: Shaped[Tensor, "*#b n"] | None = None,
        cache: Cache | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the queries after cross-attention and the MLP.

        Args:
            x: Queries. A batch size of 1 is broadcast.
            tokens: `Tokens`, a tensor `b n c`, or the keys and values that an earlier call stored in a cache
                (`cache.memory`).
            mask: Key-padding mask `b n`, attention mask `b h q k`, or a callable such as `masks.Causal()`. It is
                combined with the tokens' own mask by logical and.
            positions: Query positions for rotary embeddings; by default consecutive, with 0 for the last query.
            token_positions: Token positions for rotary embeddings; by default consecutive, with 0 for the last token.
            cache: Cache that stores the keys and values for later calls: `reads.SharedMemory` or
                `reads.KeysValuesCache`.
            capture: Container that stores the attention weights; see `reads.AttentionCapture`.

        Raises:
            TypeError: If the tokens are not floating point, or do not have the model's dtype.
            ValueError: If the tokens have the wrong width, rank or device.
        """
        options: dict[str, object] = {} if positions is None else {"positions": positions}
        x = x if mask is None else finite_where_masked(x, mask, masks.Queries)
        if capture is not None:
            options["capture"] = capture
            if isinstance(tokens, (Tokens, Tensor)):
                capture.grid = tokens.grid if isinstance(tokens, Tokens) else None
        inputs: object = tokens
        if isinstance(tokens, (Tokens, Tensor)):
            self._check(tokens)
            grows = cache is not None and cache.appends  # if True, the mask covers the cached keys too
            num_queries = x.shape[1] if cache is None or cache.num_queries is None else cache.num_queries
            tokens = without_masked_tokens(tokens, mask, x.shape[1])
            token_mask, mask = (None, mask) if grows else (mask, None)
            source = Source(tokens, self.input_norm, self.strategy, token_mask, token_positions, num_queries)
            if torch.compiler.is_compiling() or self.input_norm._forward_hooks:
                source = with_norm_output(ReadContext(cast(Attention, self.attention), source))
            if getattr(self.attention, "accepts_source", False):
                inputs = source
                if cache is not None and getattr(self.attention, "accepts_cache", False):
                    options["cache"] = cache
            else:
                inputs, mask = source.normalized(), source.whole_mask()
            if grows and "cache" not in options:
                raise TypeError(
                    f"cache of keys and values needs MultiHeadAttention; got {type(self.attention).__name__}"
                )
        elif not hasattr(tokens, "memory"):
            raise TypeError(f"tokens must be Tokens, a tensor b n c or a memory; got {type(tokens).__name__}")
        attended = self.dropout(self.attention(self.query_norm(x), inputs, mask=mask, **options))
        x = x + attended if self.residual is True else gates.combine(self.residual, x, attended)
        if self.mlp is None or self.mlp_norm is None:
            return x
        out = self.dropout(self.mlp(self.mlp_norm(x)))
        return x + out if self.mlp_residual is True else gates.combine(self.mlp_residual, x, out)

    def read_context(
        self, tokens: Tokens | Float[Tensor, "b n c"], *, mask: Mask | None = None, num_queries: int = 512
    ) -> ReadContext:
        """Return the attention module and its input as a `ReadContext`, from which `reads.Auto` selects a strategy.

        Args:
            tokens: `Tokens` or a tensor, as in `forward`.
            mask: Same as in `forward`.
            num_queries: Number of queries to assume when predicting the cost of each strategy.
        """
        self._check(tokens)
        attention = cast(Attention, self.attention)
        return ReadContext(attention, Source(tokens, self.input_norm, self.strategy, mask, num_queries=num_queries))

    def _check(self, tokens: Tokens | Tensor) -> None:
        """Check that the tokens are floating point and have the right shape, dtype and device."""
        content = tokens.content if isinstance(tokens, Tokens) else tokens
        if not isinstance(content, Tensor) or not content.is_floating_point():
            checks.is_floating("tokens", content)
        if not isinstance(tokens, Tokens):
            checks.has_shape("tokens", content, "b n c", last=self.input_dim)
        elif tokens.dim != self.input_dim:
            raise ValueError(
                f"tokens must be {self.input_dim} wide, content and positions together; got {tokens.dim} "
                f"({content.shape[-1]} of content)"
            )
        checks.matches_weight("tokens", content, getattr(self.attention, "key", None))
