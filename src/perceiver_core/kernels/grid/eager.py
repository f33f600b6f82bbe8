"""Reference backend of `read_grid` in plain PyTorch. It runs on any device and does not need a compiler.

The grid is processed in slabs (slices along the first axis) to limit the memory for scores.
"""

from __future__ import annotations

import math
from math import prod

import torch
from torch import Tensor

from perceiver_core import checks, tracing
from perceiver_core.kernels.grid.interface import GridGradients, GridInputs, GridOutputs, Upstream, over_grid

LN2 = math.log(2)
MAX_SCORES = 2**22  # maximum number of scores in a slab, per sample and head


def forward(inputs: GridInputs) -> GridOutputs:
    """Compute the forward pass slab by slab, with an online softmax."""
    content_queries, axis_queries, content, scale, mask = inputs
    shape, grid = (content.shape[0], *content_queries.shape[1:3]), content.shape[2:]
    content, scale, bias = _apply_mask(content, scale, mask)
    base, total = content.new_full(shape, -torch.inf), content.new_zeros(shape)
    content_sums = content.new_zeros(*shape, content_queries.shape[-1])
    axis_sums = content.new_zeros(*shape, axis_queries.shape[-1])
    with checks.full_precision(content.device):  # autocast would compute the products in half precision
        for slab in _slabs(content_queries.shape[2], grid):
            slab_content, slab_scale = content[:, :, slab], scale[:, None, None, slab]
            products = _products(content_queries, axis_queries, slab_content, grid, slab)
            scores = products * (slab_scale / LN2) + bias[:, :, :, slab]
            new_base = torch.maximum(base, scores.flatten(3).amax(-1))
            finite_base = new_base.masked_fill(new_base == -torch.inf, 0.0)
            decay = (base - finite_base).exp2()
            weights = (scores - finite_base.reshape(*shape, *(1 for _ in grid))).exp2_()
            total = total * decay + weights.flatten(3).sum(-1)
            weights *= slab_scale
            slab_sums = torch.einsum("bhqn,bcn->bhqc", weights.flatten(3), slab_content.flatten(2))
            content_sums = content_sums * decay[..., None] + slab_sums
            axis_sums *= decay[..., None]
            _add_axis_sums(axis_sums, weights, grid, slab)
            base = new_base
    norm = total.where(total > 0, 1.0)[..., None]
    return GridOutputs(content_sums / norm, axis_sums / norm, base.masked_fill(base == -torch.inf, 0.0), total)


def backward(inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
    """Compute the gradients slab by slab."""
    content_queries, axis_queries, content, scale, mask = inputs
    base, total, d_read, d_marginals, offset = upstream
    grid = content.shape[2:]
    content, scale, bias = _apply_mask(content, scale, mask)
    inverse_total = total.where(total > 0, torch.inf).reciprocal()
    base, offset, inverse_total = (x.reshape(*x.shape, *(1 for _ in grid)) for x in (base, offset, inverse_total))
    d_content_queries, d_axis_queries = torch.zeros_like(d_read), torch.zeros_like(d_marginals)
    d_content, d_scale = (torch.zeros_like(x) if needs_token_gradients else x.new_empty(0) for x in (content, scale))
    with checks.full_precision(content.device):
        for slab in _slabs(content_queries.shape[2], grid):
            slab_content, slab_scale = content[:, :, slab], scale[:, None, None, slab]
            products = _products(content_queries, axis_queries, slab_content, grid, slab)
            d_weights = _products(d_read, d_marginals, slab_content, grid, slab)  # with respect to weights * scale
            weights = (products * (slab_scale / LN2) + bias[:, :, :, slab] - base).exp2_() * inverse_total
            d_scores = weights * (d_weights * slab_scale + offset)
            d_products = d_scores * slab_scale
            d_content_queries += torch.einsum("bhqn,bcn->bhqc", d_products.flatten(3), slab_content.flatten(2))
            _add_axis_sums(d_axis_queries, d_products, grid, slab)
            if needs_token_gradients:
                d_scale[:, slab] = (d_scores * products + weights * d_weights).sum((1, 2))
                expanded_queries = content_queries.expand_as(d_read)
                d_content[:, :, slab] = torch.einsum("bhqc,bhq...->bc...", expanded_queries, d_products)
                d_content[:, :, slab] += torch.einsum("bhqc,bhq...->bc...", d_read, weights * slab_scale)
    if content_queries.shape[0] == 1:
        d_content_queries, d_axis_queries = (x.sum(0, keepdim=True) for x in (d_content_queries, d_axis_queries))
    return GridGradients(d_content_queries, d_axis_queries, d_content, d_scale)


def _apply_mask(content: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the content and scale with zeros at masked tokens, and a bias to add to the scores.

    The bias is -inf at masked tokens and 0 at others. It has shape `b 1 1 *grid`.
    """
    bias = scale.new_zeros(scale.shape)
    if mask is not None:
        content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
        bias = bias.masked_fill(~mask, -torch.inf)
    return content, scale, bias[:, None, None]


def _slabs(num_queries: int, grid: torch.Size) -> list[slice]:
    """Return slices of the first grid axis, each of size 1 or with at most `MAX_SCORES` scores per sample and head.

    Return a single slice under torch.export, where the number of slices cannot depend on dynamic sizes.
    """
    if tracing.is_exporting():
        return [slice(0, grid[0])]
    step = max(1, MAX_SCORES // max(1, num_queries * prod(grid[1:])))
    return [slice(start, min(start + step, grid[0])) for start in range(0, grid[0], step)]


def _products(content_queries: Tensor, axis_queries: Tensor, content: Tensor, grid: torch.Size, slab: slice) -> Tensor:
    """Return the scores of one slab without the factor `scale`: `b h q *slab`. `content` holds only this slab."""
    content_queries = content_queries.expand(content.shape[0], *content_queries.shape[1:])
    products = torch.einsum("bhqc,bcn->bhqn", content_queries, content.flatten(2))
    products = products.reshape(*products.shape[:3], *content.shape[2:])
    first, *others = torch.split(axis_queries, list(grid), dim=-1)
    return sum(over_grid([first[..., slab], *others]), start=products)


def _add_axis_sums(totals: Tensor, x: Tensor, grid: torch.Size, slab: slice) -> None:
    """Sum `x` over all grid axes but one, for each grid axis in turn, and add the sums to `totals` in-place.

    `x` has shape `b h q *slab`. `totals` has shape `b h q axis_positions`. For a grid with two axes, it has one sum per
    row, followed by one sum per column.
    """
    start = 0
    for axis, size in enumerate(grid):
        others = [3 + other for other in range(len(grid)) if other != axis]
        part = slice(start + slab.start, start + slab.stop) if axis == 0 else slice(start, start + size)
        totals[..., part] += x.sum(others) if others else x
        start += size
