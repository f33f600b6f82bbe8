"""Reads of a grid whose tokens are content and one table an axis: exact, with no keys and no values.

The score of a token is a sum of a term of its content and one of its place along every axis, times a scale (that of
the layer norm), so a query needs a few numbers instead of a key for each token; and what it reads is made of sums of
the softmax weights along each axis, so no token needs a value:

    score[n, m] = scale[m] * (content_queries[n] . content[m] + sum_axes axis_queries[n, i_axis(m)])
    p = softmax over m of score * scale
    read[n] = sum_m p scale content        marginals[n, i] = sum of p scale over the tokens with index i along an axis

On the CPU one compiled loop does it (`cpp`), at about one exponential a pair; on CUDA, Triton kernels (`gpu`);
elsewhere, plain PyTorch a piece of the grid at a time. All are one custom operator, so that torch.compile and
torch.export see a single node.
The backward pass computes the weights again: nothing of size queries x tokens is ever stored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import checks
from perceiver_core.kernels.grid import eager, gpu, native

LN2 = math.log(2)


class GridRead(NamedTuple):
    """What queries read from a grid, before the small matrices that make an output of it."""

    content: Float[Tensor, "b h q c"]
    marginals: Float[Tensor, "b h q places"]
    lse: Float[Tensor, "b h q"]


def read_grid(
    content_queries: Float[Tensor, "#b h q c"],
    axis_queries: Float[Tensor, "#b h q places"],
    content: Float[Tensor, "b c *grid"],
    scale: Float[Tensor, " b *grid"],
    mask: Bool[Tensor, " b *grid"] | None = None,
) -> GridRead:
    """The read of the module's formula, in float32 or float64.

    Args:
        content_queries: what each query multiplies the content with; the softmax scale included. A batch of one
            serves all samples.
        axis_queries: what it adds for each place along each axis: the axes one after another, so that `places` is the
            sum of the grid's sizes. Batch as above.
        content: the tokens' content, channels first.
        scale: a factor for each token, 1 over the standard deviation of its layer norm, or ones.
        mask: True = attend. What masked tokens hold has no effect, NaN included.

    Returns:
        Sums of the content and along each axis, and the log-sum-exp of the scores; zeros and -inf for queries that
        may attend to nothing.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels.grid import read_grid
        >>> ask = torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 5 + 11)
        >>> read = read_grid(*ask, torch.randn(4, 3, 5, 11), torch.ones(4, 5, 11))
        >>> read.content.shape, read.marginals.shape, read.lse.shape
        (torch.Size([4, 2, 7, 3]), torch.Size([4, 2, 7, 16]), torch.Size([4, 2, 7]))
    """
    with checks.full_precision(content.device):
        # torch.compile and torch.export see one node; torch.func and forward mode need a Function.
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        read: Any = _read_grid if traced else _Read.apply
        return GridRead(*read(content_queries, axis_queries, content, scale, mask)[:3])


# The schemas are written out because they cannot be inferred where an import hook has wrapped the functions.
@torch.library.custom_op(
    "perceiver_core::read_grid",
    mutates_args=(),
    schema="(Tensor a, Tensor u, Tensor content, Tensor scale, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_grid(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read, marginals and lse, and what the backward needs: a base for the exponents (in powers of 2) and their sum."""
    _check(a, u, content, scale, mask)
    read, marginals, base, total = _kernels(a, content).forward(
        *(x.contiguous() for x in (a, u, content, scale)), None if mask is None else mask.contiguous()
    )
    return read, marginals, (base + total.log2()) * LN2, base, total


@_read_grid.register_fake
def _(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (content.shape[0], *a.shape[1:3])
    made = [content.new_empty(*shape, *last) for last in ((a.shape[-1],), (u.shape[-1],), (), (), ())]
    return made[0], made[1], made[2], made[3], made[4]


@torch.library.custom_op(
    "perceiver_core::read_grid_backward",
    mutates_args=(),
    schema="(Tensor a, Tensor u, Tensor content, Tensor scale, Tensor? mask, Tensor base, Tensor total, "
    "Tensor d_read, Tensor d_marginals, Tensor offset, bool tokens) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _read_grid_backward(  # noqa: PLR0913 (as in `eager`)
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
    """Gradients of a, u, content and scale; the last two are empty unless `tokens` asks for them."""
    _check(a, u, content, scale, mask)
    given = [x.contiguous() for x in (a, u, content, scale)]
    kept = [x.contiguous() for x in (base, total, d_read, d_marginals, offset)]
    with checks.full_precision(content.device):  # a backward pass may run inside autocast
        made: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(a, content).backward(
            *given, None if mask is None else mask.contiguous(), *kept, tokens
        )
    return made


@_read_grid_backward.register_fake
def _(  # noqa: PLR0913
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
    wanted = (content, scale) if tokens else (content.new_empty(0), scale.new_empty(0))
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, u, *wanted)]
    return made[0], made[1], made[2], made[3]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    read, marginals, _, base, total = output
    ctx.mark_non_differentiable(base, total)
    ctx.save_for_backward(*inputs, read, marginals, base, total)


def _backward(ctx: Any, d_read: Tensor, d_marginals: Tensor, d_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    a, u, content, scale, mask, read, marginals, base, total = ctx.saved_tensors
    # d score = p (d p - sum of p d p + d lse); the sum is that of the outputs with their gradients.
    offset = d_lse - (d_read * read).sum(-1) - (d_marginals * marginals).sum(-1)
    tokens = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    compute: Any = _read_grid_backward if torch.compiler.is_compiling() else _Gradients.apply
    d_a, d_u, d_content, d_scale = compute(a, u, content, scale, mask, base, total, d_read, d_marginals, offset, tokens)
    return d_a, d_u, d_content if tokens else None, d_scale if tokens else None, None


_read_grid.register_autograd(_backward, setup_context=_setup)


class _Read(torch.autograd.Function):
    """The same for torch.func, which custom operators do not serve; forward mode is refused, not zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = _read_grid(*inputs)
        return made

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)


class _Gradients(torch.autograd.Function):
    """A Function of its own so that a second derivative is refused, with words."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = _read_grid_backward(*inputs)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "a structured read is differentiable once; for second derivatives use path=reads.Dense() and "
            "kernel=reference"
        )


@_read_grid.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batch = _batch(inputs[2], dims[2])
    made = _read_grid(*_folded(info.batch_size, batch, dims, inputs))
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in made), (0,) * 5


@_read_grid_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    batch, shared = _batch(inputs[2], dims[2]), _batch(inputs[0], dims[0]) == 1
    made = _read_grid_backward(*_folded(info.batch_size, batch, dims, inputs))
    d_a, d_u, *others = (x.reshape(info.batch_size, -1, *x.shape[1:]) for x in made)
    if shared:
        d_a, d_u = d_a.sum(1, keepdim=True), d_u.sum(1, keepdim=True)
    return (d_a, d_u, *others), (0,) * 4


def _batch(x: Tensor, dim: int | None) -> int:
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _folded(size: int, batch: int, dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The mapped axis and the batch as one batch."""
    folded = []
    for x, dim in zip(inputs, dims, strict=True):
        if isinstance(x, Tensor):
            front = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = front.expand(-1, batch, *front.shape[2:]).flatten(0, 1)
        folded.append(x)
    return folded


def _kernels(a: Tensor, content: Tensor) -> Any:
    """The module whose `forward` and `backward` run where the content lies."""
    if not a.numel() or not content.numel():
        return eager
    if content.device.type == "cpu":
        return native if native.library() is not None else eager
    return eager if gpu.missing(content.device, content.shape[1]) else gpu


def _check(a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None) -> None:
    """Raises unless the compiled loop may walk over these: it looks at memory and not at shapes."""
    if content.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"content must be float32 or float64; got {content.dtype}. Convert it: content.float()")
    if content.ndim < 3 or 0 in content.shape[1:]:
        raise ValueError(f"content must be b c *grid, with a channel and a token at least; got {tuple(content.shape)}")
    batch, grid = content.shape[0], tuple(content.shape[2:])
    asked = (a.shape[0], *a.shape[1:3]) if a.ndim == 4 else ()
    wanted = {
        "content_queries": (a, (*asked, content.shape[1])),
        "axis_queries": (u, (*asked, sum(grid))),
        "scale": (scale, (batch, *grid)),
        "mask": (mask, (batch, *grid)),
    }
    for name, (x, shape) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) != shape or (x is a and x.shape[0] not in (1, batch)):
            raise ValueError(
                f"{name} must fit content {tuple(content.shape)}: #b h q .. or b *grid; got {tuple(x.shape)}"
            )
        dtype = torch.bool if name == "mask" else content.dtype
        if x.dtype != dtype or x.device != content.device:
            raise TypeError(f"{name} must be {dtype} on {content.device}, like content; got {x.dtype} on {x.device}")
