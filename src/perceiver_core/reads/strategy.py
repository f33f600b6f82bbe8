"""Interfaces for reads (cross-attentions). A strategy computes a `Memory` from the input of an attention module.

A `Memory` holds the keys and values of the input, as tensors or in factored form (see `factored_keys_values`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from perceiver_core import argument_types, checks, masks
from perceiver_core.kernels.reference import QueryIndices
from perceiver_core.masks import Mask
from perceiver_core.reads.axes import merged_axes
from perceiver_core.reads.machine import Cost, Machine
from perceiver_core.tokens import Tokens

Kernel: TypeAlias = Callable[..., Tensor]
"""Attention kernel `(q, k, v, *, mask) -> out`; see `kernels`."""


@runtime_checkable
class AttentionInput(Protocol):
    """Protocol for the key-value input of an attention module: a `Source` of tokens, or an existing `Memory`."""

    def memory(self, attention: Attention) -> Memory:
        """Return the keys and values. The module `attention` calls this method in its own forward pass."""
        ...


@runtime_checkable
class Memory(AttentionInput, Protocol):
    """Protocol for the keys and values that queries attend to, stored as tensors or in factored form."""

    def attend(
        self, q: Float[Tensor, "#b h q d"], kernel: Kernel, *, mask: Mask | None = None, dropout: float = 0.0
    ) -> Float[Tensor, "b h q e"]:
        """Compute the attention output of every head.

        Args:
            q: Queries. A batch size of 1, of the queries or of the keys and values, is broadcast.
            kernel: Attention kernel. `FactoredKeysValues` calls it only if `mask` or `dropout` is passed.
            mask: Attention mask in addition to the memory's own mask.
            dropout: Dropout rate of the attention weights.
        """
        ...

    def attention_map(
        self, q: Float[Tensor, "#b h q d"], kernel: Kernel, *, mask: Mask | None = None, queries: QueryIndices = None
    ) -> Float[Tensor, "b h chosen n"]:
        """Return the attention weights of the queries selected by `queries` (default: all).

        See `kernels.kernel_attention_map` for the arguments.
        """
        ...


@runtime_checkable
class Attention(Protocol):
    """Protocol for an attention module, with the attributes that strategies use; see `MultiHeadAttention`."""

    num_heads: int
    num_kv_heads: int
    kv_dim: int
    dropout: float
    training: bool
    kernel: Kernel
    key: nn.Linear
    value: nn.Linear
    key_norm: nn.Module
    rotary: nn.Module


@dataclass(frozen=True, eq=False)
class Source:
    """Input of a read (cross-attention) and the options for computing keys and values from it.

    Pass it to an attention module in place of the tokens. The module calls `memory` in its own forward pass, so that
    hooks and FSDP see every use of its projections. A source is a pytree node and has a method `to`, so libraries that
    move or cast the arguments of modules convert its tensors but not its norm.

    Args:
        tokens: Input of the read: `Tokens`, or a tensor of shape `b n c`.
        norm: Norm applied to the tokens before they are projected.
        strategy: Strategy that computes the keys and values.
        mask: Attention mask in addition to the tokens' own mask.
        positions: Positions of the tokens for rotary embeddings; None for the default of the attention's `Rotary`.
        num_queries: Total number of queries of all reads that share the keys and values, used to predict costs.
        norm_output: Output of `norm`, if the block has already called it.

    Example:
        >>> source = pc.reads.Source(torch.randn(2, 50, 10), torch.nn.LayerNorm(10), pc.reads.Dense())
        >>> pc.MultiHeadAttention(32, 10, num_heads=2)(torch.randn(2, 5, 32), source).shape
        torch.Size([2, 5, 32])
    """

    tokens: Tokens | Float[Tensor, "b n c"]
    norm: nn.Module
    strategy: Strategy
    mask: Mask | None = None
    positions: Tensor | None = None
    num_queries: int = 512
    norm_output: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Source:
        """Return the source with its tokens, mask and positions on another device. The norm is not moved."""
        names = ("tokens", "mask", "positions", "norm_output")
        return replace(self, **{n: masks.moved(getattr(self, n), device, non_blocking=non_blocking) for n in names})

    def content(self) -> Tensor:
        """Return the content if the input is `Tokens`, or the input tensor itself."""
        return self.tokens.content if isinstance(self.tokens, Tokens) else self.tokens

    def normalized(self) -> Float[Tensor, "b n c"]:
        """Concatenate the content and the position features of the tokens, and apply the norm."""
        if self.norm_output is not None:
            return self.norm_output
        tokens = self.tokens
        normalized: Tensor = self.norm(tokens.materialize() if isinstance(tokens, Tokens) else tokens)
        return normalized

    def whole_mask(self) -> Mask | None:
        """Return the tokens' own mask combined with `mask` by logical and, or None if both are None."""
        mask = None if self.mask is None else masks.from_token_mask(self.mask)
        if not isinstance(self.tokens, Tokens) or self.tokens.mask is None:
            return mask
        own = masks.Padding(self.tokens.mask.flatten(1))
        return own if mask is None else masks.and_(own, mask)

    def memory(self, attention: Attention) -> Memory:
        """Compute the keys and values with the strategy and the projections of `attention`.

        Raises:
            ValueError: If the strategy does not support the read.
        """
        context = ReadContext(attention, self)
        if reason := self.strategy.why_not(context):
            raise unable(self.strategy, reason)
        if not torch.compiler.is_compiling() and _thread.listener is not None:
            _thread.listener(context)
        return self.strategy.prepare(context)


def _source(parts: Any, rest: Any) -> Source:
    return Source(parts[0], rest[0], rest[1], parts[1], parts[2], rest[2], parts[3])


register_pytree_node(
    Source,
    lambda s: ([s.tokens, s.mask, s.positions, s.norm_output], (s.norm, s.strategy, s.num_queries)),
    _source,
)


class ReadContext(NamedTuple):
    """Attention module and its input, from which a strategy computes keys and values.

    Args:
        attention: Attention module whose projections compute the keys and values.
        source: Input of the read.
    """

    attention: Attention
    source: Source


class _Thread(threading.local):
    listener: Callable[[ReadContext], None] | None = None


_thread = _Thread()


@contextmanager
def listening(listener: Callable[[ReadContext], None]) -> Iterator[None]:
    """Context manager that calls `listener` before each `Strategy.prepare` of a read in this thread.

    The listener is not called under torch.compile, for reads that reuse existing keys and values, or for reads that the
    strategy does not support.
    """
    # Thread-local state is used because modules of other libraries would not pass a listener on to their reads.
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before


class Sizes(NamedTuple):
    """Sizes that determine the cost of a read (cross-attention).

    Args:
        batch: Batch size.
        num_tokens: Number of tokens per sample.
        token_dim: Total number of content channels and position features per token.
        num_channels: Number of content channels.
        axes: Grid size after merging axes that share a position table; see `merged_axes`.
        num_heads: Number of query heads.
        kv_dim: Key dimension plus value dimension, summed over all key-value heads.
        num_queries: Total number of queries of all reads that share the keys and values.
        element_size: Bytes per element of the dtype in which the read computes.
        device: Device type, such as "cpu".
        group_size: Number of query heads per key-value head.
    """

    batch: int
    num_tokens: int
    token_dim: int
    num_channels: int
    axes: tuple[int, ...]
    num_heads: int
    kv_dim: int
    num_queries: int
    element_size: int
    device: str
    group_size: int = 1

    def is_half(self) -> bool:
        """Return whether the read computes in a 16-bit dtype."""
        return self.element_size == 2

    def num_threads(self) -> int:
        """Return the number of threads that PyTorch uses on the CPU, or 1 for other devices."""
        return torch.get_num_threads() if self.device == "cpu" else 1

    def pairs(self) -> int:
        """Return the number of attention scores: batch size x heads x queries x tokens."""
        return self.batch * self.num_heads * self.num_queries * self.num_tokens

    def materialized_bytes(self) -> int:
        """Return the total size, in bytes, of the tokens, the normalized tokens, and the keys and values."""
        return self.batch * self.num_tokens * (2 * self.token_dim + self.kv_dim) * self.element_size

    @classmethod
    def of(cls, context: ReadContext) -> Sizes:
        """Return the sizes of a read.

        Under torch.compile, typical values are used for the batch size, the grid size and the number of queries. A
        decision that depends on the actual values would specialize the graph to them.
        """
        attention, source = context
        tokens, content = source.tokens, source.content()
        axes = merged_axes(tokens) if isinstance(tokens, Tokens) else tuple(content.shape[1:-1])
        batch, device, element_size = content.shape[0], content.device.type, checks.product_dtype(content).itemsize
        num_queries = source.num_queries
        if torch.compiler.is_compiling():
            batch, num_queries = 1 if device == "cpu" else 16, 512
            axes = (65_536,) if len(axes) == 1 else (256,) * len(axes)
        return cls(
            batch=batch,
            num_tokens=prod(axes),
            token_dim=tokens.dim if isinstance(tokens, Tokens) else content.shape[-1],
            num_channels=content.shape[-1],
            axes=axes,
            num_heads=attention.num_heads,
            kv_dim=attention.kv_dim,
            num_queries=num_queries,
            element_size=element_size,
            device=device,
            group_size=attention.num_heads // attention.num_kv_heads,
        )


@runtime_checkable
class Strategy(Protocol):
    """Protocol for read (cross-attention) strategies, which differ in speed and memory use, not in results."""

    def why_not(self, context: ReadContext) -> str:
        """Return the reason why this strategy does not support a read, or an empty string if it does."""
        ...

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Predict the cost of a read from its sizes and the machine constants."""
        ...

    def prepare(self, context: ReadContext) -> Memory:
        """Compute the keys and values (`Memory`) of a read. `why_not(context)` must return an empty string."""
        ...


argument_types.describe(Strategy, "an object such as reads.Dense() or reads.Auto()")


def unable(strategy: Strategy, reason: str) -> ValueError:
    """Return the ValueError to raise if a strategy does not support a read."""
    return ValueError(
        f"{strategy} cannot compute this read: {reason}. Choose another strategy, such as reads.Auto() or reads.Dense()"
    )
