"""Keys and values in factored form: a scale times the sum of a content term and one term per grid axis.

For example, the key of the token in row i and column j of an image is

    key = r (W_content content[i, j] + W_positions rows[i] + W_positions columns[j]) + constant

- `rows`, `columns`: Position tables, one per grid axis. The token's position features are `rows[i] + columns[j]`.
- W_content, W_positions: Projection weights for content and position features, multiplied by the weight of the norm.
  For a layer norm, the mean of each row of [W_content, W_positions] is subtracted. This replaces the subtraction of the
  token's mean.
- r: 1 / standard deviation of the token. A token is the concatenation of content and position features.
- constant: Bias of the projection plus the projected bias of the norm.

Values have the same form. Each table is projected only once, not for every token and sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import checks, masks
from perceiver_core.kernels import PartialAttention
from perceiver_core.kernels.reference import QueryIndices
from perceiver_core.masks import Mask
from perceiver_core.reads import slabs
from perceiver_core.reads.axes import axis_tables
from perceiver_core.reads.dense import KeysValues
from perceiver_core.reads.slabs import Slab
from perceiver_core.reads.strategy import Attention, Kernel
from perceiver_core.tokens import Tokens


class Norm(NamedTuple):
    """Parameters of a layer norm (`center=True`) or an RMS norm (`center=False`)."""

    eps: float = 0.0
    weight: Float[Tensor, " p"] | None = None
    bias: Float[Tensor, " p"] | None = None
    center: bool = True


class Projection(NamedTuple):
    """Key or value projection: weights for content, weights for position features, and biases."""

    content: Float[Tensor, "h d c"]
    positions: Float[Tensor, "h d p"]
    constant: Float[Tensor, "h 1 d"]


class FactoredKeysValues(NamedTuple):
    """Keys and values of tokens on a grid, in factored form. It implements `Memory`.

    The factored form stores the content, the position tables and the projections, from which keys and values follow.

    Args:
        content: Content of the tokens, `b *grid c`.
        tables: One position table `size p` per grid axis; empty for tokens without position features.
        mask: Boolean mask of the tokens, `b *grid`, True = attend; None to attend to all.
        norm: Norm before the projections, without its weight and bias; None for no norm.
        keys: Key projection, with the norm's weight and bias folded in.
        values: Value projection, with the norm's weight and bias folded in.
        attend_slab: Function that computes attention to a slab (a range of indices along one grid axis):
            `reads.structured.attend_slab` or `reads.factored.attend_slab`.
        tokens_per_slab: Maximum number of tokens per slab on the CPU, summed over the batch. The maximum on a GPU is 64
            times larger.
    """

    content: Float[Tensor, "b *grid c"]
    tables: tuple[Float[Tensor, "size p"], ...]
    mask: Bool[Tensor, " b *grid"] | None
    norm: Norm | None
    keys: Projection
    values: Projection
    attend_slab: AttendSlab
    tokens_per_slab: int

    def grid(self) -> tuple[int, ...]:
        """Return the grid size."""
        return tuple(self.content.shape[1:-1])

    def memory(self, attention: Attention) -> FactoredKeysValues:
        """Return `self`, which already holds keys and values."""
        return self

    def attend(
        self, q: Float[Tensor, "#b h q d"], kernel: Kernel, *, mask: Mask | None = None, dropout: float = 0.0
    ) -> Float[Tensor, "b h q e"]:
        """Compute the attention output of every head.

        By default, attention is computed from the factored form, in slabs along one grid axis for large inputs, and
        `kernel` is not used. With a mask or dropout, the keys and values are materialized and passed to `kernel`.
        """
        if mask is not None or dropout:
            return self.form(q.dtype).attend(q, kernel, mask=mask, dropout=dropout)
        return self.attend_with_lse(q).output

    def over(self, content: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None) -> FactoredKeysValues:
        """Return the memory of other tokens, with the same projections. PyTorch 2.6 does not compile `_replace`."""
        parts = self.norm, self.keys, self.values, self.attend_slab, self.tokens_per_slab
        return FactoredKeysValues(content, tables, mask, *parts)

    def attend_with_lse(self, q: Float[Tensor, "#b h q d"]) -> PartialAttention:
        """Compute the attention output and the log-sum-exp of every query's scores, which `kernels.merge` needs."""
        memory, batch = self, q.shape[0]
        if self.content.shape[0] == 1 != batch:
            content = self.content.expand(batch, *self.content.shape[1:])
            mask = None if self.mask is None else self.mask.expand(batch, *self.mask.shape[1:])
            memory = self.over(content, self.tables, mask)
        attended = slabs.attend(q, memory)
        return PartialAttention(attended.output.to(q.dtype), attended.lse)

    def attention_map(
        self, q: Float[Tensor, "#b h q d"], kernel: Kernel, *, mask: Mask | None = None, queries: QueryIndices = None
    ) -> Float[Tensor, "b h chosen n"]:
        """Return the attention weights of the queries selected by `queries` (default: all)."""
        return self.form(q.dtype).attention_map(q, kernel, mask=mask, queries=queries)

    def planes(self) -> Float[Tensor, "b c *grid"]:
        """Return the content in channels-first layout and float32 or float64, with zeros at masked tokens."""
        content = self.content if self.mask is None else self.content.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        planes = content.movedim(-1, 1).to(self.keys.content.dtype)
        if self.norm is not None and self.norm.center and not self.tables:
            planes = planes - planes.mean(1, keepdim=True)  # same result, but a large mean would reduce precision
        return planes

    def scale(self, planes: Tensor) -> Float[Tensor, " b *grid"]:
        """Return the scale factor of the norm for each token: 1 / standard deviation, 1 / root mean square, or 1."""
        if self.norm is None:
            return planes.new_ones(planes.shape[0], *planes.shape[2:])
        channels, width = self.keys.content.shape[-1], self.tables[0].shape[-1] if self.tables else 0
        mean = planes.sum(1, keepdim=True) / channels if self.norm.center else planes.new_zeros(())
        squares = (planes - mean).square().sum(1)
        if width:
            position_squares, position_mean = _position_moments(self.tables, center=self.norm.center)
            squares = squares + position_squares
            if self.norm.center:  # Chan et al. 1979: squared deviations of two groups from their common mean
                between = (mean.squeeze(1) - position_mean).square()
                squares = squares + (channels * width / (channels + width)) * between
        return (squares / (channels + width) + self.norm.eps).rsqrt()

    def slab(self, slab: Slab) -> FactoredKeysValues:
        """Return the keys and values of the tokens in `slab`, in factored form."""
        axis, start, length = slab
        content = self.content.narrow(axis + 1, start, length)
        tables = tuple([x.narrow(0, start, length) if i == axis else x for i, x in enumerate(self.tables)])
        mask = None if self.mask is None else self.mask.narrow(axis + 1, start, length)
        return self.over(content, tables, mask)

    def project_tables(self, part: Projection) -> list[Float[Tensor, "h size d"]]:
        """Project each position table with `part`, the key or value projection. Return zeros if there are no tables."""
        if not self.tables:
            heads, width, _ = part.content.shape
            return [part.content.new_zeros(heads, size, width) for size in self.grid()]
        return [table @ part.positions.mT for table in self.tables]

    def form(self, dtype: torch.dtype) -> KeysValues:
        """Return the keys and values of all tokens as tensors in `dtype`."""
        with checks.full_precision(self.content.device):
            planes = self.planes()
            scale, content = self.scale(planes).flatten(1).unsqueeze(-1), planes.flatten(2).mT
            keys, values = (self._form(part, content, scale).to(dtype) for part in (self.keys, self.values))
        return KeysValues(keys, values, None if self.mask is None else masks.Padding(self.mask.flatten(1)))

    def _form(self, part: Projection, content: Tensor, scale: Tensor) -> Float[Tensor, "b h n d"]:
        tables = [rearrange(table, "h size d -> size (h d)") for table in self.project_tables(part)]
        terms = [_broadcastable(table, [axis], len(tables)) for axis, table in enumerate(tables)]
        positions = sum(terms[1:], start=terms[0]).expand(*self.grid(), -1).flatten(0, -2)  # the same for all samples
        weight, batch = part.content.flatten(0, 1).mT, content.shape[0]
        sums = torch.baddbmm(positions.expand(batch, -1, -1), content, weight.expand(batch, -1, -1))
        formed = torch.addcmul(part.constant.flatten(), sums, scale)
        return rearrange(formed, "b n (h d) -> b h n d", h=part.content.shape[0])


AttendSlab: TypeAlias = Callable[[Tensor, FactoredKeysValues], PartialAttention]
"""Function `(q, memory) -> PartialAttention` that computes attention to the tokens of one slab."""


def factor(
    tokens: Tokens,
    norm: Norm | None,
    key: tuple[Float[Tensor, "k p"], Float[Tensor, " k"] | None],
    value: tuple[Float[Tensor, "v p"], Float[Tensor, " v"] | None],
    *,
    num_heads: int,
    attend_slab: AttendSlab,
    tokens_per_slab: int = slabs.TOKENS,
) -> FactoredKeysValues:
    """Return the keys and values of tokens in factored form.

    Args:
        tokens: Content `b *grid c` and position tables.
        norm: Norm before the projections; None for no norm.
        key: Weight and bias (or None) of the key projection, for all heads.
        value: Weight and bias (or None) of the value projection, for all heads.
        num_heads: Number of key-value heads.
        attend_slab: See `FactoredKeysValues`.
        tokens_per_slab: See `FactoredKeysValues`.

    Example:
        >>> from perceiver_core.reads.factored_keys_values import Norm
        >>> tokens = pc.Tokens(torch.randn(2, 5, 7, 3), (torch.randn(5, 1, 6), torch.randn(1, 7, 6)))
        >>> weights = torch.randn(16, 9), torch.randn(16)
        >>> memory = pc.reads.factor(
        ...     tokens, Norm(1e-5), weights, weights, num_heads=4, attend_slab=pc.reads.structured.attend_slab
        ... )
        >>> memory.attend_with_lse(torch.randn(2, 4, 11, 4)).output.shape
        torch.Size([2, 4, 11, 4])
    """
    wide = torch.promote_types(tokens.content.dtype, torch.float32)
    grid, tables = axis_tables(tokens, wide)
    content = tokens.content.reshape(tokens.content.shape[0], *grid, tokens.content.shape[-1])
    mask = None if tokens.mask is None else tokens.mask.reshape(content.shape[:-1])
    # Use the sizes of the weights, which stay static if torch.compile makes the content's sizes dynamic.
    channels = key[0].shape[-1] - (tables[0].shape[-1] if tables else 0)
    with checks.full_precision(content.device):
        keys, values = (_split(channels, norm, weight.to(wide), bias, num_heads) for weight, bias in (key, value))
    norm = None if norm is None else Norm(norm.eps, center=norm.center)  # weight and bias are in the projections
    return FactoredKeysValues(content, tables, mask, norm, keys, values, attend_slab, tokens_per_slab)


def _split(channels: int, norm: Norm | None, weight: Tensor, bias: Tensor | None, heads: int) -> Projection:
    """Fold a norm into the linear layer after it, and split its input channels into content and positions."""
    constant = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(weight.dtype)
    if norm is not None:
        if norm.bias is not None:
            constant = constant + weight @ norm.bias.to(weight.dtype)
        if norm.weight is not None:
            weight = weight * norm.weight.to(weight.dtype)
        if norm.center:
            weight = weight - weight.mean(-1, keepdim=True)
    weight = weight.reshape(heads, -1, weight.shape[-1])
    return Projection(weight[..., :channels], weight[..., channels:], constant.reshape(heads, 1, -1))


def _position_moments(tables: Sequence[Tensor], *, center: bool) -> tuple[Tensor, Tensor]:
    """Return the sum of squares and the mean of the position features of every token, as two tensors `*grid`.

    If `center` is True, squared deviations from the mean are added. If False, squares are added and the mean is zero.
    """
    means = [table.mean(-1, keepdim=True) if center else table.new_zeros(table.shape[0], 1) for table in tables]
    centered = [table - mean for table, mean in zip(tables, means, strict=True)]
    count = len(tables)
    squares = [_broadcastable(x.square().sum(-1), [axis], count) for axis, x in enumerate(centered)]
    for first, second in combinations(range(count), 2):
        squares.append(_broadcastable(2 * centered[first] @ centered[second].mT, [first, second], count))
    mean = [_broadcastable(mean.squeeze(-1), [axis], count) for axis, mean in enumerate(means)]
    return sum(squares[1:], squares[0]), sum(mean[1:], mean[0])


def _broadcastable(x: Tensor, axes: list[int], count: int) -> Tensor:
    """Insert axes of size 1 into `x`, which has the grid axes `axes`, to broadcast it over all `count` grid axes."""
    return x[tuple([slice(None) if axis in axes else None for axis in range(count)])]
