"""Dense strategy: materialize tokens, normalize them, project them to keys and values, and call an attention kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import masks
from perceiver_core.kernels import kernel_attention_map
from perceiver_core.kernels.varlen import WIDEST
from perceiver_core.masks import Mask
from perceiver_core.reads.machine import Machine
from perceiver_core.reads.strategy import Attention, Cost, Kernel, QueryIndices, ReadContext, Sizes
from perceiver_core.registry import register


class KeysValues(NamedTuple):
    """Named tuple of the keys and values of an input. It implements `Memory`.

    Args:
        keys: Keys of g key-value heads, `b g n d`.
        values: Values, `b g n e`.
        mask: Attention mask of these keys; None to attend to all.

    Example:
        >>> memory = pc.reads.KeysValues(torch.randn(3, 2, 50, 8), torch.randn(3, 2, 50, 5))
        >>> memory.attend(torch.randn(3, 2, 7, 8), pc.kernels.sdpa).shape
        torch.Size([3, 2, 7, 5])
    """

    keys: Float[Tensor, "b g n d"]
    values: Float[Tensor, "b g n e"]
    mask: Mask | None = None

    def attend(
        self, q: Float[Tensor, "#b h q d"], kernel: Kernel, *, mask: Mask | None = None, dropout: float = 0.0
    ) -> Float[Tensor, "b h q e"]:
        """Compute the attention output of every head; see `Memory.attend`."""
        keys, values = self.keys, self.values
        if q.shape[:2] != keys.shape[:2]:
            q, keys, values = _broadcast(q, keys, values)
        mask = self.mask if mask is None else masks.and_(self.mask, mask)
        return kernel(q, keys, values, mask=mask, dropout=dropout) if dropout else kernel(q, keys, values, mask=mask)

    def attention_map(
        self, q: Float[Tensor, "#b h q d"], kernel: Kernel, *, mask: Mask | None = None, queries: QueryIndices = None
    ) -> Float[Tensor, "b h chosen n"]:
        """Return the attention weights of selected queries; see `Memory.attention_map`."""
        q, keys, _ = _broadcast(q, self.keys, self.values)
        return kernel_attention_map(kernel, q, keys, mask=masks.and_(self.mask, mask), queries=queries)

    def memory(self, attention: Attention) -> KeysValues:
        """Return `self`, which is already a memory."""
        return self

    def append(self, later: KeysValues) -> KeysValues:
        """Concatenate these keys and values with later ones along the token axis.

        Raises:
            ValueError: If either has a mask, which covers its own keys only. Pass the read a mask of all keys instead.
        """
        if self.mask is not None or later.mask is not None:
            raise ValueError(
                "keys and values with a mask of their own cannot be appended; pass the read a mask of all keys: mask="
            )
        return KeysValues(torch.cat([self.keys, later.keys], 2), torch.cat([self.values, later.values], 2))


def _broadcast(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat key-value heads for grouped queries, and broadcast a batch size of 1 on either side."""
    if (group_size := q.shape[1] // keys.shape[1]) > 1:
        keys, values = (repeat(x, "b g n d -> b (g s) n d", s=group_size) for x in (keys, values))
    if q.shape[0] == 1:
        return q.expand(keys.shape[0], -1, -1, -1), keys, values
    if keys.shape[0] == 1:
        return q, keys.expand(q.shape[0], -1, -1, -1), values.expand(q.shape[0], -1, -1, -1)
    return q, keys, values


def kernel_cost(
    sizes: Sizes, machine: Machine, matmul: float, *, flops: float, moved: float, overhead: float = 0.0
) -> Cost:
    """Return the cost of computing keys and values, and of an attention kernel on them.

    Args:
        sizes: Sizes of the read.
        machine: Machine constants.
        matmul: Throughput of the projections to keys and values, in GFLOP/s.
        flops: Floating-point operations of these projections.
        moved: Bytes read and written to compute keys and values.
        overhead: Fixed overhead, in microseconds.
    """
    kv_width, half = sizes.kv_dim * sizes.group_size, sizes.half()  # total width over all query heads
    kernel = 2.0 * sizes.batch * sizes.num_queries * sizes.num_tokens * kv_width
    attention = machine.attention_half if half else machine.attention
    if half and kv_width > 2 * WIDEST * sizes.num_heads:
        blocks = sizes.batch * sizes.num_heads * -(-sizes.num_queries // 32)
        attention = machine.attention_wide * min(1.0, blocks / machine.blocks)
    seconds = 1e-9 * (flops / matmul + moved / machine.copy + kernel / attention + sizes.pairs() * machine.softmax)
    seconds += 1e-6 * overhead
    written = sizes.batch * sizes.num_tokens * sizes.kv_dim * sizes.element_size
    return Cost(flops + kernel, moved + written, seconds)


@partial(register, name="reads.Dense")
@dataclass(frozen=True)
class Dense:
    """Strategy that materializes, normalizes and projects all tokens to keys and values. It supports every read.

    Example:
        >>> read = pc.CrossAttend(32, 10, strategy=pc.reads.Dense())
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])
    """

    def why_not(self, context: ReadContext) -> str:
        """Return an empty string, because this strategy supports every read."""
        return ""

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Return the cost of concatenating, normalizing and projecting the tokens, and of attention."""
        per_token = sizes.batch * sizes.num_tokens
        moved = per_token * (6 * sizes.token_dim + sizes.kv_dim) * sizes.element_size
        matmul = machine.matmul_half if sizes.half() else machine.linear
        return kernel_cost(sizes, machine, matmul, flops=2 * per_token * sizes.token_dim * sizes.kv_dim, moved=moved)

    def prepare(self, context: ReadContext) -> KeysValues:
        """Compute the keys and values of all tokens."""
        attention, source = context
        return project(attention, source.normalized(), source.positions, source.whole_mask())


def project(
    attention: Attention, inputs: Tensor, positions: Tensor | None = None, mask: Mask | None = None
) -> KeysValues:
    """Compute the keys and values of an input `b n c`, with linear projections, key norm and rotary embedding."""
    keys, values = attention.key(inputs), attention.value(inputs)
    keys = attention.key_norm(split_heads(keys, attention.num_kv_heads))
    keys = attention.rotary(keys) if positions is None else rotate(attention.rotary, keys, positions)
    return KeysValues(keys, split_heads(values, attention.num_kv_heads), mask)


def split_heads(x: Float[Tensor, "b n hd"], num_heads: int) -> Float[Tensor, "b h n d"]:
    """Split a projection into heads. It avoids the overhead of einops, which matters for small reads."""
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def rotate(rotary: nn.Module, heads: Tensor, positions: Tensor) -> Tensor:
    """Apply a rotary embedding to queries or keys `b h n d` at `positions`; a no-op for nn.Identity."""
    if type(rotary) is nn.Identity:
        return heads
    rotated: Tensor = rotary(heads, positions)
    return rotated
