"""Caches that a read stores its memory in, and captured attention weights."""

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
    """Storage of a memory for later calls of a read."""

    appends: ClassVar[bool]
    num_queries: int | None

    def update(self, memory: Memory) -> Memory:
        """Store the memory of a call's input, and return the memory that its queries attend to."""
        ...


class SharedMemory:
    """Cache of a memory that several reads with the same weights share.

    `read(x, tokens, cache=cache)` stores it, and `read(x, cache.memory)` attends to it again. Later reads receive it as
    an input, so that a recomputation by activation checkpointing does the same as the original call.

    Args:
        num_queries: Total number of queries of these reads, from which the strategy is chosen.

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
        """Store `memory` unless one is stored or was released, and return it."""
        if self.memory is None and not self._released:
            self.memory, self._grad_enabled = memory, torch.is_grad_enabled()
        return memory

    def has_graph(self) -> bool:
        """Return whether the memory was computed in the current gradient mode; in a reentrant checkpoint it was not."""
        return self.memory is None or self._grad_enabled == torch.is_grad_enabled()

    def release(self) -> None:
        """Drop the memory and store no other, so that a checkpoint that keeps the cache keeps no memory alive."""
        self.memory, self._released = None, True


class KeysValuesCache:
    """Growing cache of keys and values, for sequences that are generated token by token.

    Each call appends the keys and values of its input; its queries attend to all. A mask covers all of them.

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
        """Append keys and values, and return all.

        Raises:
            TypeError: A memory that is not of formed keys and values.
        """
        if not isinstance(memory, KeysValues):
            raise TypeError(
                f"a growing cache takes formed keys and values; got {type(memory).__name__}. Use strategy=reads.Dense()"
            )
        self.memory = memory if self.memory is None else self.memory.append(memory)
        return self.memory


@dataclass
class AttentionCapture:
    """Attention weights of one read, filled in while a model runs: pass it as `capture=` to the model.

    Args:
        read: Index of the read, or of a resampler's layer; negative indices count from the last.
        queries: Indices of the queries whose weights are captured; all of them by default.
        weights: Captured weights, `b h chosen n`.
        grid: Grid of the tokens, if they have one.

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
        """Return the captured weights.

        Raises:
            RuntimeError: The model ran without the read.
        """
        if self.weights is None:
            raise RuntimeError("no attention weights were captured: the model did not pass `capture` to the read")
        return self.weights
