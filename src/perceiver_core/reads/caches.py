"""Caches for the keys and values of attention layers, and a container for captured attention weights."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from perceiver_core.kernels.reference import QueryIndices
from perceiver_core.reads.dense import KeysValues
from perceiver_core.reads.strategy import Attention, Memory


@runtime_checkable
class Cache(Protocol):
    """Protocol for a cache that stores the keys and values (`Memory`) of an attention layer for later calls.

    Args:
        appends: Whether `update` appends to the stored keys and values. If True, masks must also cover the cached keys.
        num_queries: Total number of queries of all calls that use the same keys and values. It affects the choice of
            strategy. None to use the number of queries of the current call.
    """

    appends: ClassVar[bool]
    num_queries: int | None

    def update(self, memory: Memory) -> Memory:
        """Store the keys and values of the current input, and return the keys and values to attend to."""
        ...


class SharedMemory:
    """Cache of the keys and values of one input, shared by several reads (cross-attentions) with the same weights.

    The first read, `read(x, tokens, cache=cache)`, stores the keys and values in `cache.memory`. Later reads reuse
    them: `read(x, cache.memory)`. They are passed explicitly, so that activation checkpointing recomputes a read with
    the same keys and values.

    Args:
        num_queries: Total number of queries of all reads that share the cache, used to choose the strategy. Defaults to
            the number of queries of the first read.

    Example:
        >>> read, cache = pc.CrossAttend(32, 10), pc.reads.SharedMemory(num_queries=10)
        >>> x = read(torch.randn(2, 5, 32), torch.randn(2, 50, 10), cache=cache)
        >>> read(x, cache.memory).shape
        torch.Size([2, 5, 32])
    """

    appends = False

    def __init__(self, num_queries: int | None = None) -> None:
        self.num_queries = num_queries
        self.memory: Memory | None = None
        self._released = self._grad_enabled = False

    def update(self, memory: Memory) -> Memory:
        """Return `memory`, and store it if the cache is empty and `release` was not called."""
        if self.memory is None and not self._released:
            self.memory, self._grad_enabled = memory, torch.is_grad_enabled()
        return memory

    def has_graph(self) -> bool:
        """Return whether the keys and values were stored in the current gradient mode. True for an empty cache.

        For example, False if gradients are enabled now, but the keys and values were stored under `torch.no_grad` by
        the forward pass of a reentrant activation checkpoint. They then have no autograd graph.
        """
        return self.memory is None or self._grad_enabled == torch.is_grad_enabled()

    def release(self) -> None:
        """Drop the keys and values, and ignore later updates.

        Activation checkpoints keep their arguments, including this cache, until the backward pass. Without this call,
        they would also keep the keys and values.
        """
        self.memory, self._released = None, True


class OpaqueMemory:
    """Wrapper for keys and values that libraries do not cast when it is passed to a module.

    FSDP's mixed precision casts all tensors in tuples and dataclasses among the arguments of a module, but the
    projections in a `FactoredKeysValues` must stay in float32.

    Args:
        content: Keys and values. The attention module obtains them by calling `memory`.
    """

    def __init__(self, content: Memory) -> None:
        self.content = content

    def memory(self, attention: Attention) -> Memory:
        """Return the keys and values."""
        return self.content

    def to(self, *args: Any, **kwargs: Any) -> OpaqueMemory:
        """Return the keys and values on another device, with the arguments of `torch.Tensor.to`."""
        moved = tree_map(lambda part: part.to(*args, **kwargs) if hasattr(part, "to") else part, self.content)
        return OpaqueMemory(moved)


class KeysValuesCache:
    """Growing cache of keys and values, for generating sequences token by token.

    Each call appends the keys and values of its input. Queries attend to all cached keys, so masks must cover all of
    them.

    Example:
        >>> block, cache, x = pc.SelfAttend(32, num_heads=4), pc.reads.KeysValuesCache(), torch.randn(1, 5, 32)
        >>> first = block(x[:, :4], mask=pc.masks.Causal(), cache=cache)
        >>> last = block(x[:, 4:], cache=cache)
        >>> torch.testing.assert_close(torch.cat([first, last], 1), block(x, mask=pc.masks.Causal()))
    """

    appends = True
    num_queries: int | None = None

    def __init__(self) -> None:
        self.memory: KeysValues | None = None

    def update(self, memory: Memory) -> KeysValues:
        """Append the keys and values of `memory`, and return all cached keys and values.

        Raises:
            TypeError: If `memory` is not a `KeysValues`, for example if it is a `FactoredKeysValues`.
        """
        if not isinstance(memory, KeysValues):
            raise TypeError(
                f"a growing cache takes formed keys and values; got {type(memory).__name__}. Use strategy=reads.Dense()"
            )
        self.memory = memory if self.memory is None else self.memory.append(memory)
        return self.memory


class AttentionCapture:
    """Container for the attention weights of one read (cross-attention). Pass it to a model as `capture=`.

    Args:
        read: Index of the read in an encoder, or of the layer in a resampler (default: the last).
        queries: Indices of the queries whose weights are captured; None for all queries.

    The model sets two attributes. `weights` are the captured weights, `b h chosen n`, where `chosen` is the number of
    captured queries. `grid` is the grid size of the `Tokens`, or None if the input is a plain tensor.

    Example:
        >>> capture = pc.reads.AttentionCapture(queries=[0, 3])
        >>> out = pc.CrossAttend(32, 10, num_heads=2)(torch.randn(2, 5, 32), torch.randn(2, 50, 10), capture=capture)
        >>> capture.result().shape
        torch.Size([2, 2, 2, 50])
    """

    # Not a dataclass, because FSDP's mixed precision copies dataclasses among the arguments of a module.
    def __init__(self, read: int = -1, queries: QueryIndices = None) -> None:
        self.read, self.queries = read, queries
        self.weights: Float[Tensor, "b h chosen n"] | None = None
        self.grid: tuple[int, ...] | None = None

    def result(self) -> Float[Tensor, "b h chosen n"]:
        """Return the captured weights, `b h chosen n`, where `chosen` is the number of captured queries.

        Raises:
            RuntimeError: If no weights were captured.
        """
        if self.weights is None:
            raise RuntimeError("no attention weights were captured: the model did not pass `capture` to the read")
        return self.weights
