"""Backend of `read_grid` on CUDA: prepares tensors for the Triton kernels and merges the partial results.

Each program computes a part of the grid (see `triton_plan`), relative to the largest score of this part. The kernels
see a grid of two axes: all axes but the last are flattened to rows. Axis queries of these axes are therefore added up
before a launch, and sums per row are reduced to sums per axis after it. Queries are the last axis of all tensors.
"""

from __future__ import annotations

import math
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.kernels.grid import eager
from perceiver_core.kernels.grid.interface import (
    GridFallbackWarning,
    GridGradients,
    GridInputs,
    GridOutputs,
    Saved,
    Upstream,
)
from perceiver_core.kernels.grid.triton_launch import NoKernelError, launch_over_queries, launch_over_tokens
from perceiver_core.kernels.grid.triton_plan import WARP, Plan

LOG2E = 1 / math.log(2)
MAX_CHANNELS = 64  # more do not fit on chip
MIN_CAPABILITY = (8, 0)  # compute capability that Triton needs

_failures: dict[torch.device, str] = {}  # why kernels could not be built, by device


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # no GPU appears while a graph is traced
def why_unavailable(device: torch.device, channels: int) -> str:
    """Return the reason why the kernels cannot run on a device; empty if they can."""
    if device.type != "cuda":
        return f"there is no compiled loop for {device.type}"
    if not _has_triton():
        return "Triton is not installed"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it would need an NVIDIA GPU of compute capability 8.0 or higher"
    if channels > MAX_CHANNELS:
        return f"content of {channels} channels does not fit on chip; {MAX_CHANNELS} do"
    return _failures.get(device, "")


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401 (only whether it is installed)
    except ImportError:
        return False
    return True


def forward(inputs: GridInputs) -> GridOutputs:
    """Compute the read by the kernels, or in plain PyTorch if none can be built for this GPU."""
    axis = _axis_to_swap(inputs.content.shape[2:])
    if axis is not None:
        inputs = _swap_inputs(inputs, axis)
    try:
        outputs = _forward(inputs)
    except NoKernelError as error:
        _warn_of_fallback(inputs.content.device, error)
        outputs = eager.forward(inputs)
    if axis is not None:
        outputs = outputs._replace(marginals=_swap_tables(outputs.marginals, axis, inputs.content.shape[2:]))
    return outputs


def backward(inputs: GridInputs, saved: Saved, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
    """Compute the gradients by the kernels, or in plain PyTorch if none can be built for this GPU."""
    grid = inputs.content.shape[2:]
    axis = _axis_to_swap(grid)
    if axis is not None:
        inputs = _swap_inputs(inputs, axis)
        upstream = upstream._replace(d_marginals=_swap_tables(upstream.d_marginals, axis, grid))
    try:
        gradients = _backward(inputs, saved, upstream, needs_token_gradients)
    except NoKernelError as error:
        _warn_of_fallback(inputs.content.device, error)
        gradients = eager.backward(inputs, saved, upstream, needs_token_gradients)
    if axis is None:
        return gradients
    d_content_queries, d_axis_queries, *d_tokens = gradients
    d_content, d_scale = (_swap(x, axis, grid) if needs_token_gradients else x for x in d_tokens)
    d_axis_queries = _swap_tables(d_axis_queries, axis, inputs.content.shape[2:])
    return GridGradients(d_content_queries, d_axis_queries, d_content, d_scale)


def _axis_to_swap(grid: torch.Size) -> int | None:
    """Return the axis to swap with the last: the longest, if the last is much shorter; otherwise None."""
    longest = max(range(len(grid)), key=lambda axis: grid[axis])
    return longest if grid[-1] < WARP // 2 < grid[longest] else None


def _swap(x: Tensor, axis: int, grid: torch.Size) -> Tensor:
    """Swap an axis of the grid with the last."""
    return x.transpose(x.ndim - len(grid) + axis, -1).contiguous()


def _swap_tables(tables: Tensor, axis: int, grid: torch.Size) -> Tensor:
    """Swap the entries of an axis with those of the last axis, in a tensor `.. axis_positions`."""
    parts = list(torch.split(tables, list(grid), dim=-1))
    parts[axis], parts[-1] = parts[-1], parts[axis]
    return torch.cat(parts, dim=-1)


def _swap_inputs(inputs: GridInputs, axis: int) -> GridInputs:
    content_queries, axis_queries, content, scale, mask = inputs
    grid = content.shape[2:]
    return GridInputs(
        content_queries,
        _swap_tables(axis_queries, axis, grid),
        _swap(content, axis, grid),
        _swap(scale, axis, grid),
        None if mask is None else _swap(mask, axis, grid),
    )


def _warn_of_fallback(device: torch.device, error: NoKernelError) -> None:
    """Warn, and make later reads on this device use plain PyTorch directly."""
    reason = f"no kernel could be built: {error}"
    warnings.warn(
        f"structured reads on {device} use plain PyTorch, slowly: {reason}", GridFallbackWarning, stacklevel=3
    )
    _failures[device] = reason  # not before the warning, which raises where warnings are errors


def _forward(inputs: GridInputs) -> GridOutputs:
    plan, new = Plan.of(inputs), inputs.content.new_empty
    queries, parts = inputs.content_queries.shape[2], (plan.batch_heads, plan.splits, plan.groups)
    read = new(*parts, inputs.content_queries.shape[-1], plan.queries)
    bases, totals = new(*parts, plan.queries), new(*parts, plan.queries)
    row_sums, row_bases = (new(plan.batch_heads, plan.groups, plan.height, plan.queries) for _ in range(2))
    column_sums = new(plan.batch_heads, plan.splits, plan.stretches, plan.stretch, plan.queries)
    column_bases = new(plan.batch_heads, plan.splits, plan.stretches, plan.queries)
    query_tensors = _query_tensors(plan, inputs.content_queries * LOG2E, inputs.axis_queries * LOG2E)
    results = (read, bases, totals, row_sums, row_bases, column_sums, column_bases)
    launch_over_queries(plan, "forward", *query_tensors, *_token_tensors(plan, inputs), *results)
    base = bases.amax((1, 2))
    base = base.masked_fill(base == -torch.inf, 0.0)
    factor = (bases - base[:, None, None]).exp2()
    total = (totals * factor).sum((1, 2))
    rows = row_bases.sub_(base[:, None, None]).exp2_().mul_(row_sums).sum(1)
    columns = column_sums.mul_((column_bases - base[:, None, None]).exp2_()[:, :, :, None]).sum(1)
    marginals = torch.cat([*_row_axis_sums(rows, plan.row_axes), columns.flatten(1, 2)[:, : plan.width]], 1)
    norm = total.where(total > 0, 1.0)[:, None]
    read = (read * factor[:, :, :, None]).sum((1, 2)) / norm
    merged = (read, marginals / norm, base[:, None], total[:, None])
    read, marginals, base, total = (_transpose(_split_heads(plan, x, queries)) for x in merged)
    return GridOutputs(read, marginals, Saved(base[..., 0], total[..., 0]))


def _backward(inputs: GridInputs, saved: Saved, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
    plan, (content_queries, axis_queries, content, scale, _) = Plan.of(inputs), inputs
    inverse_total = saved.total.where(saved.total > 0, torch.inf).reciprocal()
    d_read, d_marginals = (x * inverse_total[..., None] for x in upstream[:2])
    content_queries, axis_queries = content_queries * LOG2E, axis_queries * LOG2E
    tokens = _token_tensors(plan, inputs)
    base, offset = (_pad(x, plan.queries) for x in (saved.base, upstream.offset * inverse_total))
    parts = (plan.batch_heads, plan.splits, plan.groups)
    d_content_queries = content.new_empty(*parts, content_queries.shape[-1], plan.queries)
    d_rows = content.new_empty(plan.batch_heads, plan.groups, plan.height, plan.queries)
    d_columns = content.new_empty(plan.batch_heads, plan.splits, plan.padded_width, plan.queries)
    query_tensors = _query_tensors(plan, content_queries, axis_queries)
    upstream_tensors = _query_tensors(plan, d_read, d_marginals)
    results = d_content_queries, d_rows, d_columns
    launch_over_queries(plan, "backward_queries", *query_tensors, *tokens, base, *upstream_tensors, offset, *results)
    d_columns = d_columns.sum(1)[:, : plan.width]
    d_axis_queries = torch.cat([*_row_axis_sums(d_rows.sum(1), plan.row_axes), d_columns], 1)
    queries, shared = content_queries.shape[2], content_queries.shape[0] == 1
    merged = (_split_heads(plan, x, queries) for x in (d_content_queries.sum((1, 2)), d_axis_queries))
    d_content_queries, d_axis_queries = (_transpose(x.sum(0, keepdim=True) if shared else x) for x in merged)
    if not needs_token_gradients:
        return GridGradients(d_content_queries, d_axis_queries, content.new_empty(0), scale.new_empty(0))
    # This kernel takes the tables of columns with the columns last.
    query_tensors = *query_tensors[:2], _columns_last(plan, axis_queries)
    upstream_tensors = *upstream_tensors[:2], _columns_last(plan, d_marginals)
    d_content, d_scale = (torch.empty_like(x) for x in tokens[:2])
    launch_over_tokens(
        plan, "backward_tokens", *query_tensors, *tokens, base, *upstream_tensors, offset, d_content, d_scale
    )
    d_content, d_scale = (x[..., : plan.width].contiguous() for x in (d_content, d_scale))
    return GridGradients(d_content_queries, d_axis_queries, d_content, d_scale)


def _query_tensors(plan: Plan, content: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficients of the content, of rows and of columns, `b h .. q`, with padded queries.

    Args:
        plan: Plan of the read.
        content: Content queries, or the upstream gradient of the read, `b h q c`.
        tables: Axis queries, or the upstream gradient of the marginals, `b h q axis_positions`.
    """
    *row_tables, columns = torch.split(tables, [*plan.row_axes, plan.width], dim=-1)
    leading = tables.shape[:-1]
    rows = tables.new_zeros(*leading, *(1 for _ in plan.row_axes))
    for axis, table in enumerate(row_tables):
        rows = rows + table.reshape(*leading, *(size if i == axis else 1 for i, size in enumerate(plan.row_axes)))
    padded = [_pad(_transpose(x), plan.queries) for x in (content, rows.reshape(*leading, -1), columns)]
    return padded[0], padded[1], padded[2]


def _columns_last(plan: Plan, tables: Tensor) -> Tensor:
    """Return the part of the last axis, `b h q columns`, with padded queries."""
    columns = tables[..., tables.shape[-1] - plan.width :]
    return F.pad(columns, (0, 0, 0, plan.queries - tables.shape[2])).contiguous()


def _token_tensors(plan: Plan, inputs: GridInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return content, scale and the bias of the scores, with padded columns; masked tokens are zero."""
    _, _, content, scale, mask = inputs
    if mask is None:
        scale = _pad(scale, plan.padded_width, value=1.0)
        return _pad(content, plan.padded_width), scale, scale  # kernels without a mask read no bias
    content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
    bias = torch.zeros_like(scale).masked_fill_(~mask, -torch.inf)
    return _pad(content, plan.padded_width), _pad(scale, plan.padded_width, value=1.0), _pad(bias, plan.padded_width)


def _pad(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Pad the last axis to a size."""
    return F.pad(x, (0, size - x.shape[-1]), value=value) if x.shape[-1] < size else x.contiguous()


def _split_heads(plan: Plan, x: Tensor, queries: int) -> Tensor:
    """Split samples and heads into two axes, and remove the padding of the queries."""
    return x.reshape(plan.samples, plan.heads, *x.shape[1:])[..., :queries]


def _transpose(x: Tensor) -> Tensor:
    """Swap the last two axes, in memory as well."""
    return x.mT.contiguous()


def _row_axis_sums(rows: Tensor, row_axes: tuple[int, ...]) -> list[Tensor]:
    """Reduce sums per row, `batch_heads rows q`, to sums per index of each row axis, `batch_heads size q`."""
    rows = rows.reshape(len(rows), *row_axes, rows.shape[-1]) if row_axes else rows
    axes = range(1, len(row_axes) + 1)
    return [rows.sum([axis for axis in axes if axis != kept]) if len(row_axes) > 1 else rows for kept in axes]
