"""Reads of a grid in plain PyTorch, a slab of its first axis at a time: for any device, and without a compiler."""

from __future__ import annotations

import math
from math import prod

import torch
from torch import Tensor

LN2 = math.log(2)
PIECE = 2**22  # scores held at once, for each sample and head


def forward(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read, marginals, base and total: see `op`."""
    shape, grid = (content.shape[0], *a.shape[1:3]), content.shape[2:]
    content, scale, hidden = _cleaned(content, scale, mask)
    base, total = content.new_full(shape, -torch.inf), content.new_zeros(shape)
    read, marginals = content.new_zeros(*shape, a.shape[-1]), content.new_zeros(*shape, u.shape[-1])
    for slab in _slabs(a, grid):
        scores = (
            _sums(a, u, content[:, :, slab], grid, slab) * (scale[:, None, None, slab] / LN2) + hidden[:, :, :, slab]
        )
        top = torch.maximum(base, scores.flatten(3).amax(-1))
        start = top.masked_fill(top == -torch.inf, 0.0)
        shrink = (base - start).exp2()
        p = (scores - _over(start, grid)).exp2_()
        total = total * shrink + p.flatten(3).sum(-1)
        p *= scale[:, None, None, slab]
        read = read * shrink[..., None] + torch.einsum("bhqn,bcn->bhqc", p.flatten(3), content[:, :, slab].flatten(2))
        marginals *= shrink[..., None]
        _add_marginals(marginals, p, grid, slab)
        base = top
    norm = total.where(total > 0, 1.0)[..., None]
    return read / norm, marginals / norm, base.masked_fill(base == -torch.inf, 0.0), total


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
    grid = content.shape[2:]
    content, scale, hidden = _cleaned(content, scale, mask)
    base, offset = _over(base, grid), _over(offset, grid)
    inverse = _over(total.where(total > 0, torch.inf).reciprocal(), grid)
    d_a, d_u = torch.zeros_like(d_read), torch.zeros_like(d_marginals)
    d_content, d_scale = (torch.zeros_like(x) if tokens else x.new_empty(0) for x in (content, scale))
    for slab in _slabs(a, grid):
        c, r = content[:, :, slab], scale[:, None, None, slab]
        sums, gifts = _sums(a, u, c, grid, slab), _sums(d_read, d_marginals, c, grid, slab)
        p = (sums * (r / LN2) + hidden[:, :, :, slab] - base).exp2_() * inverse
        d_scores = p * (gifts * r + offset)
        d_sums = d_scores * r
        d_a += torch.einsum("bhqn,bcn->bhqc", d_sums.flatten(3), c.flatten(2))
        _add_marginals(d_u, d_sums, grid, slab)
        if tokens:
            d_scale[:, slab] = (d_scores * sums + p * gifts).sum((1, 2))
            d_content[:, :, slab] = torch.einsum("bhqc,bhq...->bc...", a.expand_as(d_read), d_sums)
            d_content[:, :, slab] += torch.einsum("bhqc,bhq...->bc...", d_read, p * r)
    if a.shape[0] == 1:
        d_a, d_u = d_a.sum(0, keepdim=True), d_u.sum(0, keepdim=True)
    return d_a, d_u, d_content, d_scale


def _cleaned(content: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Content and scale, zero where the mask hides tokens, and what it adds to their scores."""
    hidden = scale.new_zeros(scale.shape)
    if mask is not None:
        content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
        hidden = hidden.masked_fill(~mask, -torch.inf)
    return content, scale, hidden[:, None, None]


def _slabs(a: Tensor, grid: torch.Size) -> list[slice]:
    step = max(1, PIECE // max(1, a.shape[2] * prod(grid[1:])))
    return [slice(start, min(start + step, grid[0])) for start in range(0, grid[0], step)]


def _over(x: Tensor, grid: torch.Size) -> Tensor:
    return x.reshape(*x.shape, *(1 for _ in grid))


def _sums(a: Tensor, u: Tensor, content: Tensor, grid: torch.Size, slab: slice) -> Tensor:
    """The scores of a slab before they are scaled."""
    sums = torch.einsum("bhqc,bcn->bhqn", a.expand(content.shape[0], *a.shape[1:]), content.flatten(2))
    sums = sums.reshape(*sums.shape[:3], *content.shape[2:])
    for axis, table in enumerate(torch.split(u, list(grid), dim=-1)):
        here = table[..., slab] if axis == 0 else table
        places = [here.shape[-1] if other == axis else 1 for other in range(len(grid))]
        sums = sums + here.reshape(*table.shape[:-1], *places)
    return sums


def _add_marginals(marginals: Tensor, weights: Tensor, grid: torch.Size, slab: slice) -> None:
    start = 0
    for axis, size in enumerate(grid):
        others = [3 + other for other in range(len(grid)) if other != axis]
        here = slice(start + slab.start, start + slab.stop) if axis == 0 else slice(start, start + size)
        marginals[..., here] += weights.sum(others) if others else weights
        start += size
