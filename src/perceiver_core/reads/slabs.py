"""Attention over a large grid, computed one slab at a time to limit peak memory.

A slab is a range of indices along the longest grid axis. The results for all slabs are merged exactly
(`kernels.merge`). The backward pass recomputes each slab.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from perceiver_core import tracing
from perceiver_core.kernels import PartialAttention, merge

if TYPE_CHECKING:
    from perceiver_core.reads.factored_keys_values import FactoredKeysValues

TOKENS = 2**20  # maximum number of tokens per slab, summed over the batch
FORMED_NUMBERS = 2**25  # maximum number of elements in the keys and values of a slab
ENTRIES = 2**22  # maximum of heads x queries x slab length
GPU_FACTOR = 64  # slabs are larger on a GPU, where they need not fit in caches


class Slab(NamedTuple):
    """Range of indices along a grid axis."""

    axis: int
    start: int
    length: int


def attend(q: Float[Tensor, "#b h q d"], memory: FactoredKeysValues) -> PartialAttention:
    """Compute attention over keys and values in factored form, slab by slab if the input is large."""
    slabs = _slabs(q, memory)
    if len(slabs) == 1:
        return memory.attend_slab(q, memory)
    leaves, spec = tree_flatten((q, memory))
    return PartialAttention(*_InSlabs.apply(slabs, spec, *leaves))  # type: ignore[no-untyped-call, unused-ignore]


def factor_for(device: torch.device) -> int:
    """Return the maximum slab size on `device`, divided by the maximum slab size on the CPU."""
    return 1 if device.type == "cpu" else GPU_FACTOR


def _slabs(q: Tensor, memory: FactoredKeysValues) -> list[Slab]:
    """Split the longest grid axis into slabs.

    Small inputs form a single slab. So do all inputs under torch.compile, where a comparison of sizes would specialize
    the graph, and under torch.func and forward-mode AD, which do not support recomputation in the backward pass.
    """
    grid = memory.grid()
    if torch.compiler.is_compiling() or tracing.transformed():
        return [Slab(0, 0, grid[0])]
    axis = max(range(len(grid)), key=grid.__getitem__)
    size, factor = grid[axis], factor_for(memory.content.device)
    by_tokens = memory.tokens_per_slab * factor * size // max(1, memory.content.shape[0] * prod(grid))
    by_entries = ENTRIES * factor // max(1, prod(q.shape[1:3]))
    step = max(1, min(by_tokens, by_entries))
    return [Slab(axis, start, min(step, size - start)) for start in range(0, size, step)]


class _InSlabs(torch.autograd.Function):
    """Autograd function that computes attention slab by slab and recomputes each slab in the backward pass."""

    @staticmethod
    def forward(ctx: Any, slabs: list[Slab], spec: TreeSpec, *leaves: Any) -> tuple[Tensor, Tensor]:
        q, memory = tree_unflatten(leaves, spec)
        merged = reduce(merge, (memory.attend_slab(q, memory.slab(slab)) for slab in slabs))
        ctx.slabs, ctx.spec = slabs, spec
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*merged, *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        return merged.output, merged.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        output, lse, *tensors = ctx.saved_tensors
        leaves = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]
        needed = [i for i, needs_gradient in enumerate(ctx.needs_input_grad[2:]) if needs_gradient]
        totals = {i: torch.zeros_like(leaves[i]) for i in needed}
        q, memory = tree_unflatten(leaves, ctx.spec)
        for slab in ctx.slabs:
            inputs, spec = tree_flatten((q, memory.slab(slab)))
            for i in needed:
                inputs[i] = inputs[i].detach().requires_grad_()
            with torch.enable_grad():
                part = memory.attend_slab(*tree_unflatten(inputs, spec))
            share = (part.lse.detach() - lse).exp().masked_fill(lse == -torch.inf, 0.0)
            d_part = share.unsqueeze(-1) * d_output
            d_part_lse = share * (d_output * (part.output.detach() - output)).sum(-1) + share * d_lse
            gradients = torch.autograd.grad(
                tuple(part),
                [inputs[i] for i in needed],
                (d_part.to(part.output.dtype), d_part_lse),
                materialize_grads=True,
            )
            for i, gradient in zip(needed, gradients, strict=True):
                _accumulate(totals[i], gradient, slab)
        return (None, None, *(totals.get(i) for i in range(len(leaves))))


def _accumulate(total: Tensor, gradient: Tensor, slab: Slab) -> None:
    """Add the gradient from one slab to `total`, in-place.

    The gradient has the same shape as `total` if all slabs share the tensor. Otherwise, it covers only the slab's range
    along one axis.
    """
    for dim, (size, full) in enumerate(zip(gradient.shape, total.shape, strict=True)):
        if size != full:
            total = total.narrow(dim, slab.start, slab.length)
    total += gradient
