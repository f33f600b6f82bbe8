"""CPU backend of `read_grid`. It calls the compiled C++ code in `cpp/`."""

from __future__ import annotations

from array import array
from math import prod

import torch

from perceiver_core.kernels.grid import cpp_library
from perceiver_core.kernels.grid.interface import GridGradients, GridInputs, GridOutputs, Upstream

BLOCK = 16  # queries per task of the forward pass; equals `BLOCK` in `cpp/grid.h`
MIN_TASKS = 32  # target number of parallel tasks; it is not the number of threads, so that results are reproducible
MIN_TOKENS = 4  # minimum tokens in a split, per number that it returns for a query; with fewer, setup time dominates
MAX_SPLIT_BYTES = 2**26  # maximum total memory for the results of all splits


def forward(inputs: GridInputs) -> GridOutputs:
    """Compute the forward pass. With few queries, the grid is split into parts that are processed in parallel."""
    content_queries, axis_queries, content, _, _ = inputs
    batch, grid = content.shape[0], content.shape[2:]
    _, heads, queries, channels = content_queries.shape
    axis_positions = axis_queries.shape[-1]
    splits = 1  # a grid with a single axis is not split, because its axis queries are as large as the grid
    if len(grid) > 1:
        splits = _num_splits(batch * heads * -(-queries // BLOCK), inputs, channels + axis_positions)
    read = content.new_empty(batch, splits, heads, queries, channels)
    marginals = content.new_empty(batch, splits, heads, queries, axis_positions)
    base = content.new_empty(batch, splits, heads, queries)
    total = torch.empty_like(base)
    pointers = (None if x is None else x.data_ptr() for x in (*inputs, read, marginals, base, total))
    axes = array("q", grid)  # int64_t; the variable keeps the buffer alive during the call
    sizes = batch, *content_queries.shape, len(grid), axes.buffer_info()[0]
    cpp_library.functions()["forward", content.dtype](*sizes, *pointers, splits, torch.get_num_threads())
    if splits == 1:
        return GridOutputs(read[:, 0], marginals[:, 0], base[:, 0], total[:, 0])
    base = base.masked_fill(total == 0, -torch.inf)
    highest = base.amax(1).clamp_min(torch.finfo(base.dtype).min)  # finite if all tokens are masked
    totals = total * (base - highest[:, None]).exp2()
    total = totals.sum(1)
    share = (totals / total[:, None]).nan_to_num()[..., None]  # 0 if all tokens are masked
    return GridOutputs((read * share).sum(1), (marginals * share).sum(1), highest.where(total > 0, 0.0), total)


def backward(inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
    """Compute the gradients. The grid is split into parts, and the query gradients of all parts are summed."""
    content_queries, axis_queries, content, scale, _ = inputs
    batch, grid = content.shape[0], content.shape[2:]
    single_axis = len(grid) == 1  # each split then writes its own positions of one axis-query gradient
    width = content_queries.shape[-1] + (0 if single_axis else axis_queries.shape[-1])
    splits = _num_splits(batch, inputs, width)
    d_content_queries = content.new_empty(batch, splits, *content_queries.shape[1:])
    d_axis_queries = content.new_empty(batch, 1 if single_axis else splits, *axis_queries.shape[1:])
    d_content, d_scale = (torch.empty_like(x) if needs_token_gradients else x.new_empty(0) for x in (content, scale))
    tensors = *inputs, *upstream, d_content_queries, d_axis_queries, d_content, d_scale
    pointers = (None if x is None else x.data_ptr() for x in tensors)  # 0 (null) for empty tensors
    axes = array("q", grid)  # int64_t; the variable keeps the buffer alive during the call
    sizes = batch, *content_queries.shape, len(grid), axes.buffer_info()[0]
    cpp_library.functions()["backward", content.dtype](*sizes, *pointers, splits, torch.get_num_threads())
    summed = (0, 1) if content_queries.shape[0] == 1 else (1,)
    return GridGradients(
        d_content_queries.sum(summed).reshape(content_queries.shape),
        d_axis_queries.sum(summed).reshape(axis_queries.shape),
        d_content,
        d_scale,
    )


def _num_splits(num_tasks: int, inputs: GridInputs, width: int) -> int:
    """Return the number of parts into which the grid is split to get at least `MIN_TASKS` parallel tasks.

    `MIN_TOKENS` and `MAX_SPLIT_BYTES` limit the number of parts. `num_tasks` is the number of tasks without splitting.
    Each part returns `width` numbers per sample, head and query.
    """
    content = inputs.content
    split_bytes = content.shape[0] * prod(inputs.content_queries.shape[1:3]) * width * content.element_size()
    most = min(MAX_SPLIT_BYTES // max(split_bytes, 1), prod(content.shape[2:]) // (MIN_TOKENS * width))
    return max(1, min(-(-MIN_TASKS // num_tasks), most))
