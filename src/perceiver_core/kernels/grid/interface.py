"""Interface of the `read_grid` backends: inputs, outputs, and the warning about a slower fallback.

A backend is a Python module that implements the protocol `Backend`. The backends are `cpp` for CPUs, `triton` for CUDA,
and `eager`, the reference in plain PyTorch. The module `operator` validates the tensors and makes them contiguous
before it calls a backend.

Axes in shapes: `b` is the batch size, `#b` the batch size or 1 (if all samples share the queries), `h` the number of
heads, `q` the number of queries and `c` the number of channels. `*grid` are the grid axes. `axis_positions` is the sum
of their sizes, because the numbers for all positions along all axes are concatenated: 5 + 11 for a 5 x 11 grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class GridInputs(NamedTuple):
    """Arguments of `read_grid`."""

    content_queries: Float[Tensor, "#b h q c"]
    axis_queries: Float[Tensor, "#b h q axis_positions"]
    content: Float[Tensor, "b c *grid"]
    scale: Float[Tensor, " b *grid"]
    mask: Bool[Tensor, " b *grid"] | None


class GridOutputs(NamedTuple):
    """Forward results: `content` and `marginals` of `GridRead`, and softmax statistics for the backward pass.

    The softmax weight of a token is `2 ** (score * log2(e) - base) / total`. `base` is the maximum of
    `score * log2(e)` over the tokens, or 0 if all tokens are masked. The `cpp` backend rescales lazily, so its `base`
    may be up to 16 below the maximum. `total` is the sum of `2 ** (score * log2(e) - base)` over the tokens. The
    log-sum-exp of the scores is `(base + log2(total)) * ln(2)`.
    """

    content: Float[Tensor, "b h q c"]
    marginals: Float[Tensor, "b h q axis_positions"]
    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]


class Upstream(NamedTuple):
    """Inputs of the backward pass: softmax statistics, and upstream gradients of the forward outputs.

    `base` and `total` come from `GridOutputs`. `d_read` is the gradient of `GridOutputs.content`. The gradient of a
    score is p * (d_p + offset), where p is the softmax weight, d_p is the gradient of p, and `offset` is one number per
    query: d_lse - sum(d_read * content) - sum(d_marginals * marginals).
    """

    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]
    d_read: Float[Tensor, "b h q c"]
    d_marginals: Float[Tensor, "b h q axis_positions"]
    offset: Float[Tensor, "b h q"]


class GridGradients(NamedTuple):
    """Gradients of the tensors in `GridInputs`. `content` and `scale` are empty if their gradients are not needed."""

    content_queries: Float[Tensor, "#b h q c"]
    axis_queries: Float[Tensor, "#b h q axis_positions"]
    content: Float[Tensor, ...]
    scale: Float[Tensor, ...]


@runtime_checkable
class Backend(Protocol):
    """Protocol for a `read_grid` backend: a Python module with `forward` and `backward` functions."""

    def forward(self, inputs: GridInputs) -> GridOutputs:
        """Compute the forward pass of `read_grid`."""
        ...

    def backward(self, inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
        """Recompute the softmax weights and return the gradients of the inputs.

        If `needs_token_gradients` is False, the gradients of content and scale are empty tensors.
        """
        ...


class GridFallbackWarning(RuntimeWarning):
    """Warning that structured reads use a slower fallback, because no compiled kernel is available."""


def over_grid(tables: Sequence[Tensor]) -> list[Tensor]:
    """Reshape one table `.. size` per grid axis so that they broadcast: `.. 5` and `.. 7` to `.. 5 1` and `.. 1 7`."""
    return [
        table.reshape(*table.shape[:-1], *(table.shape[-1] if i == axis else 1 for i in range(len(tables))))
        for axis, table in enumerate(tables)
    ]


def row_dots(x: Float[Tensor, "*rows n"], y: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Compute dot products along the last axis, part by part, so that the product of large tensors is not stored."""
    size = x.shape[-1] if torch.compiler.is_compiling() else max(1, 2**22 // max(1, prod(x.shape[:-1])))
    parts = zip(torch.split(x, size, -1), torch.split(y, size, -1), strict=True)
    return torch.stack([(a * b).sum(-1) for a, b in parts]).sum(0)
