"""Caches for the memory of a read (its keys and values), and a container for attention weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core.reads.dense import KeysValues
from perceiver_core.reads.strategy import Memory, QueryIndices


@runtime_checkable
class Cache(Protocol):
    """Protocol of a cache that stores the memory of a read for later calls.

    Args:
        appends: Whether `update` appends to the stored memory. If True, masks must also cover the cached keys.
        num_queries: Total number of queries of all reads that share the memory, used to select the strategy. None to
            use the number of queries of the current call.
    """

    appends: ClassVar[bool]
    num_queries: int | None

    def update(self, memory: Memory) -> Memory:
        """Store the memory of the current input, and return the memory that the queries should attend to."""
        ...


class SharedMemory:
    """Cache of a single memory, for several reads with the same weights and the same input.

    `read(x, tokens, cache=cache)` stores the memory, and `read(x, cache.memory)` attends to it again. The memory is an
    explicit argument of later reads, so that activation checkpointing recomputes them with the same memory.

    Args:
        num_queries: Total number of queries of all these reads, used to select the strategy. Defaults to the number of
            queries of the call that stores the memory.

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
        """Store `memory`, unless the cache already holds a memory or was released. Return `memory` in any case."""
        if self.memory is None and not self._released:
            self.memory, self._grad_enabled = memory, torch.is_grad_enabled()
        return memory

    def has_graph(self) -> bool:
        """Return whether the stored memory was computed in the current gradient mode. True for an empty cache.

        False after a reentrant activation checkpoint, because its forward pass runs under `torch.no_grad`.
        """
        return self.memory is None or self._grad_enabled == torch.is_grad_enabled()

    def release(self) -> None:
        """Drop the memory and ignore later updates, so that an activation checkpoint does not keep the memory alive."""
        self.memory, self._released = None, True


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
            TypeError: If `memory` is not a `KeysValues`, for example because it is in factored form.
        """
        if not isinstance(memory, KeysValues):
            raise TypeError(
                f"a growing cache takes formed keys and values; got {type(memory).__name__}. Use strategy=reads.Dense()"
            )
        self.memory = memory if self.memory is None else self.memory.append(memory)
        return self.memory


@dataclass
class AttentionCapture:
    """Container for the attention weights of one read. A model stores the weights in the object passed as `capture=`.

    Args:
        read: Index of the read in an encoder, or of the layer in a resampler; the last by default.
        queries: Indices of the queries whose weights are captured; None for all queries.
        weights: Captured weights, `b h chosen n`, where `chosen` is the number of captured queries. Set by the model.
        grid: Grid size of the tokens, or None if the input is a tensor. Set by the model.

    Example:
        >>> capture = pc.reads.AttentionCapture(queries=[0, 3])
        >>> out = pc.CrossAttend(32, 10, num_heads=2)(torch.randn(2, 5, 32), torch.randn(2, 50, 10), capture=capture)
        >>> capture.result().shape
        torch.Size([2, 2, 2, 50])
    """

    read: int = -1
    queries: QueryIndices = None
    weights: Float[Tensor, "b h chosen n"] | None = None
    grid: tuple[int, ...] | None = None

    def result(self) -> Float[Tensor, "b h chosen n"]:
        """Return the captured weights, `b h chosen n`, where `chosen` is the number of captured queries.

        Raises:
            RuntimeError: If no weights were captured.
        """
        if self.weights is None:
            raise RuntimeError("no attention weights were captured: the model did not pass `capture` to the read")
        return self.weights
