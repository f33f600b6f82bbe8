"""Interface of the backends of `read_grid`: inputs, outputs and the warning of a slower fallback.

A backend is a module with the functions of `Backend`: `cpp` on the CPU, `triton` on CUDA, and `eager`, the reference in
plain PyTorch. `operator` validates the tensors and makes them contiguous before a backend sees them.

Axes: `b` samples, `h` heads, `q` queries, `c` channels, `*grid` the axes of the grid, and `axis_positions` the
positions along all axes of the grid, one axis after another, so that its size is the sum of the grid's sizes. `#b` is
the number of samples, or 1 where all samples share their queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

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
    """Results of a forward pass: normalized sums, and softmax statistics that the backward pass needs.

    `base` is a number near the largest score of a query, times log2(e), and 0 for queries that attend to nothing;
    `total` is the sum of 2^(score log2(e) - base). The log-sum-exp of the scores is `(base + log2(total)) ln 2`.
    """

    content: Float[Tensor, "b h q c"]
    marginals: Float[Tensor, "b h q axis_positions"]
    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]


class Upstream(NamedTuple):
    """Statistics of the forward pass, and gradients of the loss with respect to its outputs.

    `d_read` is the gradient of `GridOutputs.content`. `offset` is the part of the gradient of a score that all tokens
    of a query share: d_lse - sum(d_read content) - sum(d_marginals marginals).
    """

    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]
    d_read: Float[Tensor, "b h q c"]
    d_marginals: Float[Tensor, "b h q axis_positions"]
    offset: Float[Tensor, "b h q"]


class GridGradients(NamedTuple):
    """Gradients with respect to the inputs; those of content and scale are empty unless they are needed."""

    content_queries: Float[Tensor, "#b h q c"]
    axis_queries: Float[Tensor, "#b h q axis_positions"]
    content: Float[Tensor, ...]
    scale: Float[Tensor, ...]


@runtime_checkable
class Backend(Protocol):
    """Functions that a backend module defines."""

    def forward(self, inputs: GridInputs) -> GridOutputs:
        """Compute the read of contiguous inputs."""
        ...

    def backward(self, inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
        """Recompute the softmax weights and return the gradients of the inputs."""
        ...


class GridFallbackWarning(RuntimeWarning):
    """Warning that grid reads run on a slower backend than the device allows; results are equal."""


def over_grid(tables: Sequence[Tensor]) -> list[Tensor]:
    """Reshape tables `.. size`, one per axis of a grid, so that they broadcast to `.. *grid`."""
    return [
        table.reshape(*table.shape[:-1], *(table.shape[-1] if i == axis else 1 for i in range(len(tables))))
        for axis, table in enumerate(tables)
    ]
