"""`Dense` strategy for reads (cross-attentions). It computes the keys and values of all tokens."""

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
from perceiver_core.kernels.reference import QueryIndices
from perceiver_core.kernels.varlen import WIDEST
from perceiver_core.layers.linear import apply_linear
from perceiver_core.masks import Mask
from perceiver_core.reads.machine import Cost, Machine
from perceiver_core.reads.strategy import Attention, Kernel, ReadContext, Sizes
from perceiver_core.registry import register


class KeysValues(NamedTuple):
    """Keys and values as tensors. It implements `Memory`.

    Args:
        keys: Keys, `b g n d`, for g key-value heads.
        values: Values, `b g n e`.
        mask: Attention mask; None to attend to all keys.

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
        """Return the attention weights of the queries with indices `queries`; see `Memory.attention_map`."""
        q, keys, _ = _broadcast(q, self.keys, self.values)
        return kernel_attention_map(kernel, q, keys, mask=masks.and_(self.mask, mask), queries=queries)

    def memory(self, attention: Attention) -> KeysValues:
        """Return `self`, which already holds keys and values."""
        return self

    def append(self, later: KeysValues) -> KeysValues:
        """Concatenate `self` and `later` along the token axis.

        Raises:
            ValueError: If `self` or `later` has a mask, because the mask would not cover all keys. Instead, pass a
                `mask` that covers all keys to the attention layer.
        """
        if self.mask is not None or later.mask is not None:
            raise ValueError(
                "keys and values with a mask of their own cannot be appended; pass the read a mask of all keys: mask="
            )
        return KeysValues(torch.cat([self.keys, later.keys], 2), torch.cat([self.values, later.values], 2))


def _broadcast(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat key-value heads for grouped-query attention, and expand queries, or keys and values, of batch size 1."""
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
    """Return the cost of computing keys and values and of calling an attention kernel.

    Args:
        sizes: Sizes of the read.
        machine: Machine constants.
        matmul: Throughput of the key and value projections, in GFLOP/s.
        flops: Number of floating-point operations of these projections.
        moved: Number of bytes read and written to compute keys and values.
        overhead: Fixed overhead, in microseconds.
    """
    kv_width, half = sizes.kv_dim * sizes.group_size, sizes.is_half()  # total width over all query heads
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
    """Strategy that computes the keys and values of all tokens. It supports every read (cross-attention).

    The content and the position features of each token are concatenated, normalized and projected.

    Example:
        >>> read = pc.CrossAttend(32, 10, strategy=pc.reads.Dense())
        >>> read(torch.randn(2, 5, 32), torch.randn(2, 50, 10)).shape
        torch.Size([2, 5, 32])
    """

    def why_not(self, context: ReadContext) -> str:
        """Return an empty string, because this strategy supports every read."""
        return ""

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Return the predicted cost of concatenating, normalizing and projecting all tokens, and of attention."""
        per_token = sizes.batch * sizes.num_tokens
        moved = per_token * (6 * sizes.token_dim + sizes.kv_dim) * sizes.element_size
        matmul = machine.matmul_half if sizes.is_half() else machine.linear
        return kernel_cost(sizes, machine, matmul, flops=2 * per_token * sizes.token_dim * sizes.kv_dim, moved=moved)

    def prepare(self, context: ReadContext) -> KeysValues:
        """Compute the keys and values of all tokens."""
        attention, source = context
        return project(attention, source.normalized(), source.positions, source.whole_mask())


def project(
    attention: Attention, inputs: Tensor, positions: Tensor | None = None, mask: Mask | None = None
) -> KeysValues:
    """Compute the keys and values of normalized inputs `b n c`, including key norm and rotary embedding."""
    keys = attention.key_norm(project_heads(attention.key, inputs, attention.num_kv_heads))
    keys = attention.rotary(keys) if positions is None else rotate(attention.rotary, keys, positions)
    return KeysValues(keys, project_heads(attention.value, inputs, attention.num_kv_heads), mask)


def project_heads(projection: nn.Module, x: Float[Tensor, "b n c"], num_heads: int) -> Float[Tensor, "b h n d"]:
    """Apply a linear layer and split its output into heads. Under tensor parallelism, return the heads of this device.

    Args:
        projection: Linear layer. Its `out_features` is the total width of all heads on all devices.
        x: Input of the linear layer.
        num_heads: Number of heads on all devices.

    Raises:
        ValueError: If the output on this device does not consist of whole heads.
    """
    out = apply_linear(projection, x)
    width = getattr(projection, "out_features", out.shape[-1])
    if out.shape[-1] != width:
        head_dim = width // num_heads
        if out.shape[-1] % head_dim:
            raise ValueError(
                f"num_heads must be divisible by the number of devices that share the heads; got {num_heads} heads, "
                f"{head_dim} wide each, and {out.shape[-1]} channels on this device. Use another number of devices, "
                "or do not split this attention"
            )
        num_heads = out.shape[-1] // head_dim
    return split_heads(out, num_heads)


def split_heads(x: Float[Tensor, "b n hd"], num_heads: int) -> Float[Tensor, "b h n d"]:
    """Split the last axis into heads. It does not use einops, whose overhead matters for small reads."""
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def rotate(rotary: nn.Module, heads: Tensor, positions: Tensor) -> Tensor:
    """Apply a rotary embedding at `positions` to queries or keys `b h n d`. A no-op if `rotary` is nn.Identity."""
    if type(rotary) is nn.Identity:
        return heads
    rotated: Tensor = rotary(heads, positions)
    return rotated
