"""Structured reads: cross-attention over a grid of tokens, without computing keys and values.

Each token is the concatenation of its content and its position features. The position features are a sum of one table
row per grid axis. The score of query n for token m is therefore a content term plus one term per axis, times the
token's layer-norm scale. No key is needed. No values are needed either, because `read_grid` returns sums over the
tokens that the caller projects to attention outputs. `read` sums the content of all tokens. `marginals` sums the
softmax weights of all tokens at the same position i along an axis, such as one row of an image:

    score[n, m] = scale[m] * (content_queries[n] . content[m] + sum_axes axis_queries[n, i_axis(m)])
    p[n, m] = softmax of score[n, m] over m
    read[n] = sum_m p[n, m] scale[m] content[m]
    marginals[n, i] = sum of p[n, m] scale[m] over the tokens m with i_axis(m) = i

i_axis(m) is the position of token m along the axis.

Three backends compute the same result: compiled C++ code on CPUs (`cpp`), Triton kernels on CUDA (`triton`), and plain
PyTorch elsewhere (`eager`). The C++ code takes about as long as one exponential per query and token. A custom operator
calls the backends, so that torch.compile and torch.export see a single node. ONNX graphs contain the operators of
`eager` instead. The backward pass recomputes the softmax weights, so that no tensor of size queries x tokens is saved.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import tracing
from perceiver_core.kernels.grid import cpp, cpp_library, eager, flops, triton
from perceiver_core.kernels.grid.interface import Backend, GridGradients, GridInputs, Upstream, row_dots

LN2 = math.log(2)


class GridRead(NamedTuple):
    """Results of `read_grid` for each query.

    With w = softmax weight * scale for each token, `content` is the sum of w * content over all tokens. `marginals` are
    sums of w over all tokens at the same position along an axis. For a grid with two axes, they are one sum per row,
    followed by one sum per column. `lse` is the log-sum-exp of the scores.
    """

    content: Float[Tensor, "b h q c"]
    marginals: Float[Tensor, "b h q axis_positions"]
    lse: Float[Tensor, "b h q"]


def read_grid(
    content_queries: Float[Tensor, "#b h q c"],
    axis_queries: Float[Tensor, "#b h q axis_positions"],
    content: Float[Tensor, "b c *grid"],
    scale: Float[Tensor, " b *grid"],
    mask: Bool[Tensor, " b *grid"] | None = None,
) -> GridRead:
    """Compute cross-attention over a grid of tokens in float32 or float64, without computing keys and values.

    The grid can have any number of axes. For a grid of H rows and W columns, the token in row i and column j has the
    score `scale * (content_queries . content + axis_queries[i] + axis_queries[H + j])`.

    Args:
        content_queries: One vector per query, whose dot product with the content is part of the score. The factor
            1 / sqrt(head dimension) must be included. A batch size of 1 is broadcast.
        axis_queries: Score terms of each query for each position along each axis. The same factor must be included. The
            terms of all axes are concatenated, so `axis_positions` is the sum of the axis sizes, H + W above. The batch
            size is the same as for `content_queries`.
        content: Content channels of the tokens, in channels-first layout.
        scale: Factor for the score and content of each token: 1 / standard deviation for a layer norm, or ones.
        mask: Key-padding mask, True = attend. Masked tokens have no effect, even if their content is NaN.

    Returns:
        Named tuple of `content` `b h q c`, `marginals` `b h q axis_positions` and `lse` `b h q`; see `GridRead`. If all
        tokens are masked, `content` and `marginals` are 0 and `lse` is -inf.

    Raises:
        TypeError: If an input has an unsupported dtype. All inputs must have the dtype of `content`, float32 or
            float64, and the mask must be boolean.
        TypeError: If the inputs are on different devices.
        ValueError: If the shape of an input does not match `content`.

    Example:
        >>> from perceiver_core.kernels.grid import read_grid
        >>> content_queries, axis_queries = torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 5 + 11)
        >>> read = read_grid(content_queries, axis_queries, torch.randn(4, 3, 5, 11), torch.ones(4, 5, 11))
        >>> read.content.shape, read.marginals.shape, read.lse.shape
        (torch.Size([4, 2, 7, 3]), torch.Size([4, 2, 7, 16]), torch.Size([4, 2, 7]))
    """
    if tracing.is_exporting() and torch.onnx.is_in_onnx_export():
        return GridRead(*_forward(GridInputs(content_queries, axis_queries, content, scale, mask), eager)[:3])
    flops.register()
    # torch.func and forward-mode AD need an autograd.Function. torch.compile and torch.export need one operator node.
    read: Any = _read_grid
    if tracing.transformed():
        read = _ReadGrid.apply
    return GridRead(*read(content_queries, axis_queries, content, scale, mask)[:3])


def missing_kernel(device: torch.device, channels: int) -> str:
    """Return the reason why no compiled kernel supports a device and number of content channels, or "" if one does.

    On the CPU, the first call compiles or loads the kernel. Under torch.export, no kernel is supported, because the
    exported program may run on another machine.
    """
    if tracing.is_exporting():
        return "an exported program needs PyTorch's own operators"
    if device.type == "cuda" and channels > triton.MAX_CHANNELS:
        return f"content of {channels} channels does not fit on chip; {triton.MAX_CHANNELS} do"
    return _why_unavailable(device)


# The result cannot change while a graph is traced.
@tracing.constant_under_compile
def _why_unavailable(device: torch.device) -> str:
    if device.type == "cpu":
        return "" if cpp_library.functions() else "it would need a C++ compiler"
    return triton.why_unavailable(device)


# The schemas are explicit because they cannot be inferred from functions wrapped by jaxtyping's import hook.
@torch.library.custom_op(
    "perceiver_core::read_grid",
    mutates_args=(),
    schema="(Tensor content_queries, Tensor axis_queries, Tensor content, Tensor scale, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_grid(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass. Return the fields of `GridRead`, followed by `GridOutputs.base` and `GridOutputs.total`."""
    inputs = _validated(*arguments)
    return _forward(inputs, _backend(inputs))


def _forward(inputs: GridInputs, backend: Backend) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    read, marginals, base, total = backend.forward(inputs)
    return read, marginals, (base + total.log2()) * LN2, base, total


@_read_grid.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = GridInputs(*arguments)
    shape = (inputs.content.shape[0], *inputs.content_queries.shape[1:3])
    last_axes = (inputs.content_queries.shape[-1:], inputs.axis_queries.shape[-1:], (), (), ())
    return tuple(inputs.content.new_empty(*shape, *last) for last in last_axes)


@torch.library.custom_op(
    "perceiver_core::read_grid_backward",
    mutates_args=(),
    schema="(Tensor content_queries, Tensor axis_queries, Tensor content, Tensor scale, Tensor? mask, "
    "Tensor base, Tensor total, Tensor d_read, Tensor d_marginals, Tensor offset, bool needs_token_gradients) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _read_grid_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients. Return the fields of `GridGradients`.

    The arguments are the fields of `GridInputs` and `Upstream`, and `needs_token_gradients`.
    """
    inputs, upstream = _validated(*arguments[:5]), Upstream(*(x.contiguous() for x in arguments[5:10]))
    return _backend(inputs).backward(inputs, upstream, arguments[10])


@_read_grid_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs_token_gradients = GridInputs(*arguments[:5]), arguments[-1]
    content, scale = (x if needs_token_gradients else x.new_empty(0) for x in (inputs.content, inputs.scale))
    likes = (inputs.content_queries, inputs.axis_queries, content, scale)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in likes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    read, marginals, _, base, total = output
    ctx.mark_non_differentiable(base, total)
    ctx.save_for_backward(*inputs, read, marginals, base, total)


def _backward(ctx: Any, d_read: Tensor, d_marginals: Tensor, d_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, read, marginals, base, total = ctx.saved_tensors
    # d_score = p (d_p - sum(p d_p) + d_lse), and sum(p d_p) is the sum of the outputs times their gradients.
    offset = d_lse - row_dots(d_read, read) - row_dots(d_marginals, marginals)
    needs_token_gradients = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    flops.register()
    compute: Any = _read_grid_backward if torch.compiler.is_compiling() else _ReadGridBackward.apply
    gradients = GridGradients(*compute(*inputs, base, total, d_read, d_marginals, offset, needs_token_gradients))
    if not needs_token_gradients:
        return gradients.content_queries, gradients.axis_queries, None, None, None
    return (*gradients, None)


_read_grid.register_autograd(_backward, setup_context=_setup_context)


class _ReadGrid(torch.autograd.Function):
    """Autograd function that calls `_read_grid` under torch.func, which does not support custom operators.

    In forward-mode AD, the function raises an error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _read_grid(*arguments)
        return outputs

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _ReadGridBackward(torch.autograd.Function):
    """Autograd function that calls `_read_grid_backward`. Second derivatives raise an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _read_grid_backward(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing, because second derivatives are not supported."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "a structured read is differentiable once; for second derivatives use strategy=reads.Dense() and "
            "kernel=reference"
        )


@_read_grid.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    folded, batch, _ = _fold_into_batch(info.batch_size, in_dims, arguments)
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in _read_grid(*folded)), (0,) * 5


@_read_grid_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    folded, _, query_batch = _fold_into_batch(info.batch_size, in_dims, arguments)
    gradients = [x.reshape(info.batch_size, -1, *x.shape[1:]) for x in _read_grid_backward(*folded)]
    if query_batch == 1:
        gradients[:2] = [x.sum(1, keepdim=True) for x in gradients[:2]]
    return tuple(gradients), (0,) * 4


def _fold_into_batch(size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> tuple[Any, int, int]:
    """Expand queries to the batch size of the content, and merge the vmap axis into the batch axis of every tensor.

    Returns:
        The arguments with merged axes, the batch size of the content before merging, and the batch size of the queries
        before merging.
    """
    mapped_first = list(arguments)
    for i, (x, in_dim) in enumerate(zip(arguments, in_dims, strict=True)):
        if isinstance(x, Tensor):
            mapped_first[i] = x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    query_batch, batch = mapped_first[0].shape[1], mapped_first[2].shape[1]
    folded = (x.expand(-1, batch, *x.shape[2:]).flatten(0, 1) if isinstance(x, Tensor) else x for x in mapped_first)
    return folded, batch, query_batch


def _backend(inputs: GridInputs) -> Backend:
    """Return the fastest available backend for the device and sizes of the inputs."""
    content = inputs.content
    if not inputs.content_queries.numel() or not content.numel():
        return eager
    if content.device.type == "cpu":
        return cpp if cpp_library.functions() else eager
    return eager if missing_kernel(content.device, content.shape[1]) else triton


def _validated(
    content_queries: Tensor, axis_queries: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> GridInputs:
    """Check dtypes, devices and shapes, which the backends do not check, and return contiguous inputs."""
    if content.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"content must be float32 or float64; got {content.dtype}. Convert it: content.float()")
    if content.ndim < 3 or 0 in content.shape[1:]:
        raise ValueError(f"content must be b c *grid, with a channel and a token at least; got {tuple(content.shape)}")
    batch, grid = content.shape[0], tuple(content.shape[2:])
    query_shape = tuple(content_queries.shape[:3]) if content_queries.ndim == 4 else ()
    expected = {
        "content_queries": (content_queries, (*query_shape, content.shape[1])),
        "axis_queries": (axis_queries, (*query_shape, sum(grid))),
        "scale": (scale, (batch, *grid)),
        "mask": (mask, (batch, *grid)),
    }
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if tuple(x.shape) != shape or (x is content_queries and x.shape[0] not in (1, batch)):
            raise ValueError(
                f"{name} must fit content {tuple(content.shape)}: #b h q .. or b *grid; got {tuple(x.shape)}"
            )
        dtype = torch.bool if name == "mask" else content.dtype
        if x.dtype != dtype or x.device != content.device:
            raise TypeError(f"{name} must be {dtype} on {content.device}, like content; got {x.dtype} on {x.device}")
    tensors = content_queries, axis_queries, content, scale, mask
    return GridInputs._make(None if x is None else x.contiguous() for x in tensors)
