"""CUDA backend of `read_grid`. It prepares tensors for the Triton kernels and merges their partial results.

The kernels process grids with two axes: the last grid axis (columns), and all other axes flattened (rows). Therefore,
the axis queries of all row axes are added up before a launch, and sums per row are reduced to sums per position along
each axis after the launch. In tensors with a query axis, this axis is the last. The only exception is
`backward_tokens`, which reads the axis queries of the columns as `b h q columns`.

Each program processes a part of the grid (see `triton_plan`) and sums powers 2 ** (score - base), with scores in log2
units. For the content sums, base is the maximum score in the part, which is stored in `bases`. For the sums per row and
per column, base is the running maximum when the sum was stored (`row_bases`, `column_bases`). `forward` rescales all
sums to the maximum over the whole grid and adds them up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.kernels.grid import eager
from perceiver_core.kernels.grid.interface import (
    GridFallbackWarning,
    GridGradients,
    GridInputs,
    GridOutputs,
    Upstream,
    over_grid,
)
from perceiver_core.kernels.grid.triton_launch import NoKernelError, launch_over_queries, launch_over_tokens
from perceiver_core.kernels.grid.triton_plan import WARP, Plan

LOG2E = 1 / math.log(2)
MAX_CHANNELS = 64  # maximum number of content channels that fit in registers and shared memory
MIN_CAPABILITY = (8, 0)  # minimum compute capability that Triton supports

_failures: dict[torch.device, str] = {}  # reasons why kernels could not be built, keyed by device


def why_unavailable(device: torch.device) -> str:
    """Return the reason why the Triton kernels cannot run on a device, or "" if they can."""
    if device.type != "cuda":
        return f"there is no compiled loop for {device.type}"
    if not _has_triton():
        return "Triton is not installed"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it would need an NVIDIA GPU of compute capability 8.0 or higher"
    return _failures.get(device, "")


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401 (only whether it is installed)
    except ImportError:
        return False
    return True


def _or_eager(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that warns and falls back to the eager backend if no Triton kernel can be built for the GPU.

    The reason is stored, so later reads on this GPU use the eager backend directly (see `why_unavailable`).
    """

    @wraps(compute)
    def run(inputs: GridInputs, *arguments: Any) -> Any:
        try:
            return compute(inputs, *arguments)
        except NoKernelError as error:
            device, reason = inputs.content.device, f"no kernel could be built: {error}"
            message = f"structured reads on {device} use plain PyTorch, slowly: {reason}"
            warnings.warn(message, GridFallbackWarning, stacklevel=2)
            _failures[device] = reason  # after the warning, so that every read raises if warnings are errors
            return getattr(eager, compute.__name__)(inputs, *arguments)

    return run


@_or_eager
def forward(inputs: GridInputs) -> GridOutputs:
    """Compute the forward pass with the Triton kernels."""
    axis = _axis_to_swap(inputs.content.shape[2:])
    if axis is not None:
        swapped = _swap_inputs(inputs, axis)
        outputs: GridOutputs = forward(swapped)
        return outputs._replace(marginals=_swap_tables(outputs.marginals, axis, swapped.content.shape[2:]))
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
    return GridOutputs(read, marginals, base[..., 0], total[..., 0])


@_or_eager
def backward(inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
    """Compute the gradients with the Triton kernels."""
    grid = inputs.content.shape[2:]
    axis = _axis_to_swap(grid)
    if axis is not None:
        swapped = _swap_inputs(inputs, axis)
        upstream = upstream._replace(d_marginals=_swap_tables(upstream.d_marginals, axis, grid))
        gradients: GridGradients = backward(swapped, upstream, needs_token_gradients)
        d_axis_queries = _swap_tables(gradients.axis_queries, axis, swapped.content.shape[2:])
        d_content, d_scale = gradients[2:]
        if needs_token_gradients:
            d_content, d_scale = (x.transpose(axis, -1).contiguous() for x in (d_content, d_scale))
        return GridGradients(gradients.content_queries, d_axis_queries, d_content, d_scale)
    plan, (content_queries, axis_queries, content, scale, _) = Plan.of(inputs), inputs
    base, total, d_read, d_marginals, offset = upstream
    inverse_total = total.where(total > 0, torch.inf).reciprocal()
    d_read, d_marginals = (x * inverse_total[..., None] for x in (d_read, d_marginals))
    content_queries, axis_queries = content_queries * LOG2E, axis_queries * LOG2E
    tokens = _token_tensors(plan, inputs)
    base, offset = (_pad(x, plan.queries) for x in (base, offset * inverse_total))
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
    # This kernel reads column tables as `b h q columns`.
    query_tensors = *query_tensors[:2], _columns_last(plan, axis_queries)
    upstream_tensors = *upstream_tensors[:2], _columns_last(plan, d_marginals)
    d_content, d_scale = (torch.empty_like(x) for x in tokens[:2])
    launch_over_tokens(
        plan, "backward_tokens", *query_tensors, *tokens, base, *upstream_tensors, offset, d_content, d_scale
    )
    d_content, d_scale = (x[..., : plan.width].contiguous() for x in (d_content, d_scale))
    return GridGradients(d_content_queries, d_axis_queries, d_content, d_scale)


def _axis_to_swap(grid: torch.Size) -> int | None:
    """Return the negative index of the grid axis to swap with the last axis, or None.

    The longest axis is swapped if its size is more than 16 (half a warp) and the size of the last axis is less than 16.
    """
    longest = max(range(len(grid)), key=lambda axis: grid[axis])
    return longest - len(grid) if grid[-1] < WARP // 2 < grid[longest] else None


def _swap_tables(tables: Tensor, axis: int, grid: torch.Size) -> Tensor:
    """Swap the table of grid axis `axis` with the table of the last grid axis.

    `tables` has shape `.. axis_positions` and contains the tables of all axes, concatenated. For a 40 x 3 grid and axis
    -2, the first 40 elements are moved after the last 3.
    """
    parts = list(torch.split(tables, list(grid), dim=-1))
    parts[axis], parts[-1] = parts[-1], parts[axis]
    return torch.cat(parts, dim=-1)


def _swap_inputs(inputs: GridInputs, axis: int) -> GridInputs:
    tables = _swap_tables(inputs.axis_queries, axis, inputs.content.shape[2:])
    tokens = (None if x is None else x.transpose(axis, -1).contiguous() for x in inputs[2:])
    return GridInputs._make((inputs.content_queries, tables, *tokens))


def _query_tensors(plan: Plan, content: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert `content_queries` and `axis_queries`, or `d_read` and `d_marginals`, to the layout of the kernels.

    Returns:
        Tensors `b h channels q`, `b h rows q` and `b h columns q`, padded along q. The terms of all row axes are added.
    """
    *row_tables, columns = torch.split(tables, [*plan.row_axes, plan.width], dim=-1)
    leading = tables.shape[:-1]
    rows = sum(over_grid(row_tables), start=tables.new_zeros(*leading, *(1 for _ in plan.row_axes)))
    padded = [_pad(_transpose(x), plan.queries) for x in (content, rows.reshape(*leading, -1), columns)]
    return padded[0], padded[1], padded[2]


def _columns_last(plan: Plan, tables: Tensor) -> Tensor:
    """Return the part of `tables` for the last grid axis, `b h q columns`, padded along q."""
    columns = tables[..., tables.shape[-1] - plan.width :]
    return F.pad(columns, (0, 0, 0, plan.queries - tables.shape[2])).contiguous()


def _token_tensors(plan: Plan, inputs: GridInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the content, scale and score bias of all tokens, each padded to `plan.padded_width` along the last axis.

    At masked tokens, content and scale are 0 and the bias is -inf.
    """
    _, _, content, scale, mask = inputs
    if mask is None:
        scale = _pad(scale, plan.padded_width, value=1.0)
        return _pad(content, plan.padded_width), scale, scale  # the kernels ignore the bias if there is no mask
    content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
    bias = torch.zeros_like(scale).masked_fill_(~mask, -torch.inf)
    return _pad(content, plan.padded_width), _pad(scale, plan.padded_width, value=1.0), _pad(bias, plan.padded_width)


def _pad(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Pad the last axis to `size` and return a contiguous tensor."""
    return F.pad(x, (0, size - x.shape[-1]), value=value) if x.shape[-1] < size else x.contiguous()


def _split_heads(plan: Plan, x: Tensor, queries: int) -> Tensor:
    """Split the first axis into batch and heads, and remove the padding of queries from the last axis."""
    return x.reshape(plan.samples, plan.heads, *x.shape[1:])[..., :queries]


def _transpose(x: Tensor) -> Tensor:
    """Transpose the last two axes and return a contiguous tensor."""
    return x.mT.contiguous()


def _row_axis_sums(rows: Tensor, row_axes: tuple[int, ...]) -> list[Tensor]:
    """Reduce sums per row, `batch_heads rows q`, to sums per position along each axis that was flattened to rows.

    Returns:
        List of one tensor per axis in `row_axes`, of shape `batch_heads size q`.
    """
    rows = rows.reshape(len(rows), *row_axes, rows.shape[-1]) if row_axes else rows
    axes = range(1, len(row_axes) + 1)
    return [rows.sum([axis for axis in axes if axis != kept]) if len(row_axes) > 1 else rows for kept in axes]
