"""Keys and values that stay sums: a term of the content and one of the place along each axis, times a scale.

Layer norm and projection of a token `x = [content, positions]`, whose positions are a sum of one table an axis,
distribute over these parts exactly. With W the projection's matrix times the norm's weight, its rows centered because
the norm takes the mean away, and r = 1 / standard deviation:

    key = r (W_content content + sum_axes W_positions table[i_axis]) + constant           the same for the value

so a table is projected once, not once a token and sample, tokens are never concatenated, and a structured read needs
neither key nor value. The input is taken in slabs where it is large, and attention over these merges, so that memory
does not grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from perceiver_core import checks
from perceiver_core.kernels.chunked import PartialAttention, merge, partial_attention
from perceiver_core.kernels.fastest import takes_products
from perceiver_core.masks import Padding
from perceiver_core.kernels.grid import read_grid
from perceiver_core.tokens import Tokens

SLAB = 2**20  # tokens, over the batch, that are taken at once
ENTRIES = 2**22  # queries x places along the axis that is cut, likewise
NUMBERS = 2**25  # in keys and values that are formed at once
ROOM = 64  # times as much where there are no caches to stay in: beside a CPU


Cut: TypeAlias = tuple[int, int, int]
"""An axis, where a slab starts along it, and how long it is."""


class Norm(NamedTuple):
    """A layer norm (`center`) or an RMS norm, without a module around it."""

    eps: float = 0.0
    weight: Float[Tensor, " p"] | None = None
    bias: Float[Tensor, " p"] | None = None
    center: bool = True


class Projection(NamedTuple):
    """What makes keys or values of the parts of a token: its content, its positions, and what is added in the end."""

    content: Float[Tensor, "h d c"]
    positions: Float[Tensor, "h d p"]
    constant: Float[Tensor, "h 1 d"]


class FactoredKeysValues(NamedTuple):
    """Keys and values of tokens on a grid, not formed. A slab of one is another one."""

    content: Float[Tensor, "b *grid c"]
    tables: tuple[Float[Tensor, "size p"], ...]
    mask: Bool[Tensor, " b *grid"] | None
    norm: Norm | None
    keys: Projection
    values: Projection
    form: bool = False
    """Whether who reads this forms the keys and values of a slab at a time, instead of a structured read."""

    @property
    def grid(self) -> tuple[int, ...]:
        """The size of each axis."""
        return tuple(self.content.shape[1:-1])

    def planes(self) -> Float[Tensor, "b c *grid"]:
        """The content, channels first, zero where the mask hides a token, in the dtype that is computed in."""
        content = self.content if self.mask is None else self.content.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        planes = content.movedim(-1, 1).to(self.keys.content.dtype)
        if self.norm is not None and self.norm.center and not self.tables:
            planes = planes - planes.mean(1, keepdim=True)  # changes nothing else, but large means lose digits
        return planes

    def scale(self, planes: Tensor) -> Float[Tensor, " b *grid"]:
        """What the norm multiplies each token with: 1 / its standard deviation or root mean square."""
        if self.norm is None:
            return planes.new_ones(planes.shape[0], *planes.shape[2:])
        channels, width = self.keys.content.shape[-1], self.tables[0].shape[-1] if self.tables else 0
        mean = planes.sum(1, keepdim=True) / channels if self.norm.center else planes.new_zeros(())
        squares = (planes - mean).square().sum(1)
        if width:
            at, at_mean = _positions_spread(self.tables, center=self.norm.center)
            squares = squares + at
            if self.norm.center:  # Chan et al. 1979: the spread of two groups around their common mean
                squares = squares + (channels * width / (channels + width)) * (mean.squeeze(1) - at_mean).square()
        return (squares / (channels + width) + self.norm.eps).rsqrt()

    def for_batch(self, batch: int) -> FactoredKeysValues:
        """The same for every sample of a batch, where there is one for all."""
        content, mask = self.content, self.mask
        return self._replace(
            content=content.expand(batch, *content.shape[1:]),
            mask=None if mask is None else mask.expand(batch, *mask.shape[1:]),
        )

    def slab(self, axis: int, start: int, length: int) -> FactoredKeysValues:
        """The part between two places along an axis."""
        cut = [table.narrow(0, start, length) if i == axis else table for i, table in enumerate(self.tables)]
        return self._replace(
            content=self.content.narrow(axis + 1, start, length),
            tables=tuple(cut),
            mask=None if self.mask is None else self.mask.narrow(axis + 1, start, length),
        )

    def places(self, part: Projection) -> list[Float[Tensor, "h size d"]]:
        """The tables projected: what keys or values have of each place along each axis."""
        if not self.tables:
            heads, width, _ = part.content.shape
            return [part.content.new_zeros(heads, size, width) for size in self.grid]
        return [table @ part.positions.mT for table in self.tables]

    def large(self) -> bool:
        """Whether there are more tokens than are taken at once."""
        # Under torch.compile a comparison would make the graph one for this size only.
        return not torch.compiler.is_compiling() and self.content.shape[0] * prod(self.grid) > self.formed_at_once()

    def formed_at_once(self) -> int:
        """How many tokens, over the batch, have their keys and values formed at once."""
        most = min(SLAB, NUMBERS // (self.keys.constant.numel() + self.values.constant.numel()))
        return max(1, most * _room(self.content))

    def formed(self, dtype: torch.dtype) -> tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n e"]]:
        """The keys and the values of all tokens."""
        heads = self.keys.content.shape[0]
        with checks.full_precision(self.content.device):
            planes = self.planes()
            scale, content = self.scale(planes).flatten(1).unsqueeze(-1), planes.flatten(2).mT
            keys, values = (self._formed(part, content, scale).to(dtype) for part in (self.keys, self.values))
        return rearrange(keys, "b n (h d) -> b h n d", h=heads), rearrange(values, "b n (h d) -> b h n d", h=heads)

    def _formed(self, part: Projection, content: Tensor, scale: Tensor) -> Float[Tensor, "b n hd"]:
        tables = [rearrange(table, "h size d -> size (h d)") for table in self.places(part)]
        terms = [_along(table, [axis], len(tables)) for axis, table in enumerate(tables)]
        places = sum(terms[1:], start=terms[0]).expand(*self.grid, -1).flatten(0, -2)  # for all of the batch
        weight, batch = part.content.flatten(0, 1).mT, content.shape[0]
        sums = torch.baddbmm(places.expand(batch, -1, -1), content, weight.expand(batch, -1, -1))
        return torch.addcmul(part.constant.flatten(), sums, scale)


def factor(
    tokens: Tokens,
    norm: Norm | None,
    key: tuple[Float[Tensor, "k p"], Float[Tensor, " k"] | None],
    value: tuple[Float[Tensor, "v p"], Float[Tensor, " v"] | None],
    *,
    heads: int,
) -> FactoredKeysValues:
    """Keys and values of tokens, not formed.

    Args:
        tokens: content `b *grid c` and tables.
        norm: what tokens are normalized by before they are projected; None for not at all.
        key: weight and bias of the projection to all heads' keys.
        value: the same for values.
        heads: how many heads.

    Example:
        >>> import torch
        >>> from perceiver_core import Tokens
        >>> from perceiver_core.reads.factored import Norm, attend, factor
        >>> tokens = Tokens(torch.randn(2, 5, 7, 3), position_tables=(torch.randn(5, 1, 6), torch.randn(1, 7, 6)))
        >>> weights = torch.randn(16, 9), torch.randn(16)
        >>> read = factor(tokens, Norm(eps=1e-5), weights, weights, heads=4)
        >>> attend(torch.randn(2, 4, 11, 4), read).output.shape
        torch.Size([2, 4, 11, 4])
    """
    wide = torch.promote_types(tokens.content.dtype, torch.float32)
    grid, tables = axes_of(tokens), _tables(tokens, wide)
    content = tokens.content.reshape(tokens.content.shape[0], *grid, tokens.content.shape[-1])
    mask = None if tokens.mask is None else tokens.mask.reshape(content.shape[:-1])
    # From the weights, whose sizes are numbers even where torch.compile leaves those of the content open.
    channels = key[0].shape[-1] - (tables[0].shape[-1] if tables else 0)
    with checks.full_precision(content.device):
        keys, values = (_project(channels, norm, weight.to(wide), bias, heads) for weight, bias in (key, value))
    return FactoredKeysValues(content, tables, mask, norm, keys, values)


Part: TypeAlias = Callable[[Tensor, FactoredKeysValues], PartialAttention]


def attend(q: Float[Tensor, "#b h q d"], read: FactoredKeysValues) -> PartialAttention:
    """What queries read, and the log-sum-exp of their scores.

    Args:
        q: queries; a batch of one serves all samples.
        read: what is read.
    """
    if read.content.shape[0] == 1 and q.shape[0] != 1:
        read = read.for_batch(q.shape[0])
    part, cuts = _formed_part if read.form else _structured_part, _cuts(q, read)
    if len(cuts) == 1:
        got = part(q, read)
    else:
        leaves, spec = tree_flatten((q, read))
        got = PartialAttention(*_InSlabs.apply(part, cuts, spec, *leaves))  # type: ignore[no-untyped-call]
    return PartialAttention(got.output.to(q.dtype), got.lse)


class _InSlabs(torch.autograd.Function):
    """A read slab by slab, each computed again in the backward pass: what is kept does not grow with their number."""

    @staticmethod
    def forward(ctx: Any, part: Part, cuts: list[Cut], spec: TreeSpec, *leaves: Any) -> tuple[Tensor, Tensor]:
        q, read = tree_unflatten(leaves, spec)
        got = part(q, read.slab(*cuts[0]))
        for cut in cuts[1:]:
            got = merge(got, part(q, read.slab(*cut)))
        ctx.part, ctx.cuts, ctx.spec = part, cuts, spec
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*got, *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        return got.output, got.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        output, lse, *tensors = ctx.saved_tensors
        leaves = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        totals = {i: torch.zeros_like(leaves[i]) for i in wanted}
        q, read = tree_unflatten(leaves, ctx.spec)
        for cut in ctx.cuts:
            own, spec = tree_flatten((q, read.slab(*cut)))
            for i in wanted:
                own[i] = own[i].detach().requires_grad_()
            with torch.enable_grad():
                one = ctx.part(*tree_unflatten(own, spec))
            share = (one.lse.detach() - lse).exp().masked_fill(lse == -torch.inf, 0.0)
            d_one = share.unsqueeze(-1) * d_output
            d_own = share * (d_output * (one.output.detach() - output)).sum(-1) + share * d_lse
            asked = [own[i] for i in wanted]
            found = torch.autograd.grad(tuple(one), asked, (d_one.to(one.output.dtype), d_own), allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    _add_to(totals[i], gradient, cut)
        return (None, None, None, *(totals.get(i) for i in range(len(leaves))))


def _add_to(total: Tensor, gradient: Tensor, cut: Cut) -> None:
    """Adds the gradient of a slab's part, which is shorter along one axis, or of what all slabs share."""
    for dim, (size, full) in enumerate(zip(gradient.shape, total.shape, strict=True)):
        if size != full:
            total = total.narrow(dim, cut[1], cut[2])
    total += gradient


def _structured_part(q: Tensor, read: FactoredKeysValues) -> PartialAttention:
    with checks.full_precision(q.device):
        planes = read.planes()
        scaled = q.to(planes.dtype) * q.shape[-1] ** -0.5
        got = read_grid(
            scaled @ read.keys.content,
            torch.cat([scaled @ table.mT for table in read.places(read.keys)], dim=-1),
            planes,
            read.scale(planes),
            read.mask,
        )
        out = got.content @ read.values.content.mT
        out = out + got.marginals @ torch.cat(read.places(read.values), dim=1) + read.values.constant
        # The constant of the keys adds the same to all scores of a query: it changes no weight, only their sum's log.
        same = scaled @ read.keys.constant.mT
        out = out + 0.0 * same  # its gradient is zero, not absent
        if read.mask is not None:
            nothing = (got.lse == -torch.inf).unsqueeze(-1)
            out, same = out.masked_fill(nothing, 0.0), same.masked_fill(nothing, 0.0)
        return PartialAttention(out, got.lse + same.squeeze(-1))


def _formed_part(q: Tensor, read: FactoredKeysValues) -> PartialAttention:
    keys, values = read.formed(q.dtype)
    mask = None if read.mask is None else Padding(read.mask.flatten(1))
    half = takes_products(q, keys.shape[-2])
    return partial_attention(q.expand(keys.shape[0], *q.shape[1:]), keys, values, mask=mask, half_precision_matmul=half)


def _cuts(q: Tensor, read: FactoredKeysValues) -> list[Cut]:
    """The whole, or pieces along the longest axis where the whole is large."""
    axis = 0
    if torch.compiler.is_compiling():  # see `large`
        return [(axis, 0, read.grid[axis])]
    axis = max(range(len(read.grid)), key=lambda axis: read.grid[axis])
    size, entries = read.grid[axis], max(1, prod(q.shape[1:3]))
    room = _room(read.content)
    most = read.formed_at_once() if read.form else SLAB * room
    step = max(1, min(most * size // (read.content.shape[0] * prod(read.grid)), ENTRIES * room // entries))
    return [(axis, at, min(step, size - at)) for at in range(0, size, step)]


def _room(x: Tensor) -> int:
    return 1 if x.device.type == "cpu" else ROOM


def _project(channels: int, norm: Norm | None, weight: Tensor, bias: Tensor | None, heads: int) -> Projection:
    """A linear layer after a norm, taken apart."""
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


def axes_of(tokens: Tokens) -> tuple[int, ...]:
    """The grid with the axes that a table spans together made one.

    Example:
        >>> import torch
        >>> from perceiver_core import Tokens
        >>> from perceiver_core.reads.factored import axes_of
        >>> frames, learned = torch.randn(5, 1, 1, 6), torch.randn(1, 7, 3, 6)
        >>> axes_of(Tokens(torch.randn(2, 5, 7, 3, 4), position_tables=(frames, learned)))
        (5, 21)
    """
    return tuple([prod([tokens.grid[axis] for axis in group]) for group in _groups(tokens)])


def _groups(tokens: Tokens) -> list[range]:
    spans = [_span(table) for table in tokens.position_tables]
    axes = range(len(tokens.grid))
    starts = [axis for axis in axes if all(not span[0] < axis <= span[-1] for span in spans)]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(axes)], strict=True)]


def _span(table: Tensor) -> list[int]:
    """The axes along which a table varies; the first if it is the same everywhere."""
    return [axis for axis, size in enumerate(table.shape[:-1]) if size != 1] or [0]


def _tables(tokens: Tokens, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One table for each axis of `axes_of`: the sum of those that vary along it."""
    if not tokens.position_tables:
        return ()
    width, groups = tokens.position_tables[0].shape[-1], _groups(tokens)
    parts: list[list[Tensor]] = [[] for _ in groups]
    for table in tokens.position_tables:
        number = [_span(table)[0] in group for group in groups].index(True)
        shape = [size if axis in groups[number] else 1 for axis, size in enumerate(tokens.grid)]
        parts[number].append(table.to(dtype).expand(*shape, width).reshape(-1, width))
    none = [tokens.content.new_zeros(1, width, dtype=dtype).expand(size, width) for size in axes_of(tokens)]
    # One table for an axis is taken as it is: along a line it is as large as the input.
    return tuple([sum(own[1:], own[0]) if own else zeros for own, zeros in zip(parts, none, strict=True)])


def _positions_spread(tables: Sequence[Tensor], *, center: bool) -> tuple[Tensor, Tensor]:
    """At every point of the grid, the sum of squares of its position, around the mean if `center`, and the mean."""
    means = [table.mean(-1, keepdim=True) if center else table.new_zeros(table.shape[0], 1) for table in tables]
    own = [table - mean for table, mean in zip(tables, means, strict=True)]

    count = len(tables)
    parts = [_along(x.square().sum(-1), [axis], count) for axis, x in enumerate(own)]
    for one, other in combinations(range(count), 2):
        parts.append(_along(2 * own[one] @ own[other].mT, [one, other], count))
    at = [_along(mean.squeeze(-1), [axis], count) for axis, mean in enumerate(means)]
    return sum(parts[1:], parts[0]), sum(at[1:], at[0])


def _along(x: Tensor, axes: list[int], of: int) -> Tensor:
    """A tensor over some axes of a grid, with ones for the others, so that it broadcasts over the grid."""
    return x[tuple([slice(None) if axis in axes else None for axis in range(of)])]
