"""Reads of a grid on a GPU, by the Triton kernels of `kernels`: what goes in, and how the parts that come out merge.

The kernels know grids of two axes: the last, and all others as one, for which the axis queries are added up before and
the marginals taken apart after. Parts of the grid are read by programs of their own, each relative to the largest
score that it met, so that a few queries fill a GPU as well (flash-decoding); what they found is merged here. Nothing is
added up in an order that changes: results repeat.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # queries of a program: with as many columns, what it holds fits into registers
STRETCH = 32  # columns of a program
PROGRAMS = 4  # for each multiprocessor, at least, where rows can be cut up
WIDEST = 128  # channels that fit on chip
CAPABILITY = (8, 0)  # of the GPU, at least: what Triton supports


def missing(device: torch.device, channels: int) -> str:
    """What these kernels are without on a device; empty if they can run."""
    if device.type != "cuda":
        return f"there is no compiled loop for {device.type}"
    if not _has_triton():
        return "Triton is not installed"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it would need an NVIDIA GPU of compute capability 8.0 or higher"
    return f"content of {channels} channels does not fit on chip, {WIDEST} do" if channels > WIDEST else ""


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Plan(NamedTuple):
    """How a read is cut up."""

    one: int  # samples times heads
    heads: int
    queries: int
    height: int
    width: int
    blocks: int
    splits: int
    stretches: int
    options: dict[str, Any]

    @classmethod
    def of(cls, a: Tensor, content: Tensor, mask: Tensor | None) -> Plan:
        """For these tensors on their device."""
        batch, channels, *grid = content.shape
        heads, queries = a.shape[1:3]
        height, width = prod(grid[:-1]), grid[-1]
        stretch = STRETCH
        blocks, stretches = -(-queries // BLOCK), -(-width // stretch)
        wanted = PROGRAMS * _processors(content.device)
        splits = max(1, min(height, -(-wanted // (batch * heads * blocks * stretches))))
        options = {
            "CHANNELS": channels,
            "PADDED": _power_of_two(channels),
            "SHARED": a.shape[0] == 1,
            "MASKED": mask is not None,
            "BLOCK": BLOCK,
            "STRETCH": stretch,
            "PRECISION": "ieee" if content.dtype == torch.float64 else "tf32x3",
        }
        return cls(batch * heads, heads, queries, height, width, blocks, splits, stretches, options)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What all kernels are told."""
        return self.heads, self.queries, self.height, self.width, self.blocks


def forward(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read, marginals, base and total: see `op`. Tensors are contiguous."""
    plan = Plan.of(a, content, mask)
    others, width, queries, channels = content.shape[2:-1], plan.width, plan.queries, a.shape[-1]
    parts = (plan.one, plan.splits, plan.stretches)
    read = content.new_empty(*parts, channels, queries)
    bases, totals = (content.new_empty(*parts, queries) for _ in range(2))
    row_sums, row_bases = (content.new_empty(plan.one, plan.stretches, plan.height, queries) for _ in range(2))
    column_sums = content.new_empty(plan.one, plan.splits, width, queries)
    found = (read, row_sums, row_bases, column_sums, bases, totals)
    asked = (_turned(a), *_rows_and_columns(u, others))
    given = (*asked, content, scale, scale if mask is None else mask)
    _launch("forward", prod(parts) * plan.blocks, *given, *found, *plan.numbers, *parts[1:], **plan.options)
    base = bases.amax((1, 2))
    base = base.masked_fill(base == -torch.inf, 0.0)
    share = (bases - base[:, None, None]).exp2()
    total = (totals * share).sum((1, 2))
    of_columns = share.repeat_interleave(plan.options["STRETCH"], 2)[:, :, :width]
    marginals = [
        *_of_axes((row_sums * (row_bases - base[:, None, None]).exp2()).sum(1), others),
        (column_sums * of_columns).sum(1),
    ]
    norm, shape = total.where(total > 0, 1.0)[:, None], (content.shape[0], plan.heads, -1, queries)
    read = (read * share[:, :, :, None]).sum((1, 2)) / norm
    whole = torch.cat(marginals, 1) / norm
    return (_turned(read.reshape(shape)), _turned(whole.reshape(shape)), *(x.reshape(shape)[:, :, 0] for x in (base, total)))


def backward(  # noqa: PLR0913 (what the forward was given, what it kept and what came back)
    a: Tensor,
    u: Tensor,
    content: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    base: Tensor,
    total: Tensor,
    d_read: Tensor,
    d_marginals: Tensor,
    offset: Tensor,
    tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, u, content and scale."""
    plan = Plan.of(a, content, mask)
    others, queries = content.shape[2:-1], plan.queries
    inverse = total.where(total > 0, torch.inf).reciprocal()
    asked, gifts = ((_turned(x), *_rows_and_columns(y, others)) for x, y in ((a, u), (d_read, d_marginals)))
    given = (*asked, content, scale, scale if mask is None else mask, base, inverse, *gifts, offset)
    parts = (plan.one, plan.splits, plan.stretches)
    d_a = content.new_empty(*parts, a.shape[-1], queries)
    d_rows = content.new_empty(plan.one, plan.stretches, plan.height, queries)
    d_columns = content.new_empty(plan.one, plan.splits, plan.width, queries)
    programs = prod(parts) * plan.blocks
    _launch("backward_queries", programs, *given, d_a, d_rows, d_columns, *plan.numbers, *parts[1:], **plan.options)
    shape = (content.shape[0], plan.heads, -1, queries)
    d_u = torch.cat([*_of_axes(d_rows.sum(1), others), d_columns.sum(1)], 1)
    d_a, d_u = (_turned(x.reshape(shape)) for x in (d_a.sum((1, 2)), d_u))
    if a.shape[0] == 1:
        d_a, d_u = d_a.sum(0, keepdim=True), d_u.sum(0, keepdim=True)
    if not tokens:
        return d_a, d_u, content.new_empty(0), scale.new_empty(0)
    d_content, d_scale = torch.empty_like(content), torch.empty_like(scale)
    programs = content.shape[0] * plan.height * plan.stretches
    _launch("backward_tokens", programs, *given, d_content, d_scale, *plan.numbers, plan.stretches, **plan.options)
    return d_a, d_u, d_content, d_scale


def _launch(kernel: str, programs: int, first: Tensor, *arguments: Any, **options: Any) -> None:
    from perceiver_core.attention.structured import kernels  # needs Triton, which not everyone has

    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        getattr(kernels, kernel)[(programs,)](first, *arguments, **options)


def _turned(x: Tensor) -> Tensor:
    """With the last two axes changed about, in memory as well: queries last for the kernels."""
    return x.mT.contiguous()


def _rows_and_columns(u: Tensor, others: torch.Size) -> tuple[Tensor, Tensor]:
    """Of all axes but the last, what queries add for each row; and of the last: `b h rows q` and `b h columns q`."""
    *parts, columns = u.split([*others, u.shape[-1] - sum(others)], dim=-1)
    rows = u.new_zeros(*u.shape[:-1], *(1 for _ in others))
    for axis, part in enumerate(parts):
        rows = rows + part.reshape(*u.shape[:-1], *(size if i == axis else 1 for i, size in enumerate(others)))
    return _turned(rows.reshape(*u.shape[:-1], -1)), _turned(columns)


def _of_axes(rows: Tensor, others: torch.Size) -> list[Tensor]:
    """Sums over rows, `one rows q`, taken apart: those along each axis but the last, `one size q`."""
    rows = rows.unflatten(1, others) if others else rows
    axes = range(1, len(others) + 1)
    return [rows.sum([axis for axis in axes if axis != kept]) if len(others) > 1 else rows for kept in axes]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
