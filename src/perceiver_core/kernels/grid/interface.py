"""Interface of the `read_grid` backends: their inputs and outputs, and the warning about a slower fallback.

A backend is a module with the functions of `Backend`: `cpp` on CPUs, `triton` on CUDA, and `eager`, the reference in
plain PyTorch. `operator` validates the tensors and makes them contiguous before it calls a backend.

Axes in shapes: `b` is the batch, `#b` the batch or 1 (if all samples share their queries), `h` heads, `q` queries and
`c` channels. `*grid` are the axes of the grid. `axis_positions` concatenates the positions along all grid axes, so its
size is the sum of the grid sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


class GridInputs(NamedTuple):
    """Named tuple of the arguments of `read_grid`."""

    content_queries: Float[Tensor, "#b h q c"]
    axis_queries: Float[Tensor, "#b h q axis_positions"]
    content: Float[Tensor, "b c *grid"]
    scale: Float[Tensor, " b *grid"]
    mask: Bool[Tensor, " b *grid"] | None


class GridOutputs(NamedTuple):
    """Named tuple of forward results: normalized sums, and softmax statistics that the backward pass needs.

    `base` is the maximum score of a query in log2 units, that is, times log2(e). `cpp` may return up to 16 less. It is
    0 for queries whose tokens are all masked. `total` is the sum of 2^(score log2(e) - base). The log-sum-exp of the
    scores is `(base + log2(total)) ln 2`.
    """

    content: Float[Tensor, "b h q c"]
    marginals: Float[Tensor, "b h q axis_positions"]
    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]


class Upstream(NamedTuple):
    """Named tuple of the softmax statistics of the forward pass and the gradients of its outputs.

    `d_read` is the gradient of `GridOutputs.content`. For a softmax weight p with gradient d_p, the gradient of the
    score is p (d_p + offset). `offset` is d_lse - sum(d_read content) - sum(d_marginals marginals), per query.
    """

    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]
    d_read: Float[Tensor, "b h q c"]
    d_marginals: Float[Tensor, "b h q axis_positions"]
    offset: Float[Tensor, "b h q"]


class GridGradients(NamedTuple):
    """Named tuple of input gradients. The gradients of content and scale are empty tensors if not needed."""

    content_queries: Float[Tensor, "#b h q c"]
    axis_queries: Float[Tensor, "#b h q axis_positions"]
    content: Float[Tensor, ...]
    scale: Float[Tensor, ...]


@runtime_checkable
class Backend(Protocol):
    """Protocol of a backend module."""

    def forward(self, inputs: GridInputs) -> GridOutputs:
        """Compute the read for contiguous inputs."""
        ...

    def backward(self, inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
        """Recompute the softmax weights and return the gradients of the inputs."""
        ...


class GridFallbackWarning(RuntimeWarning):
    """Warning that no compiled kernel for structured reads is available, so a slower fallback is used."""


def over_grid(tables: Sequence[Tensor]) -> list[Tensor]:
    """Reshape tables of shape `.. size`, one per grid axis, so that they broadcast to `.. *grid`."""
    return [
        table.reshape(*table.shape[:-1], *(table.shape[-1] if i == axis else 1 for i in range(len(tables))))
        for axis, table in enumerate(tables)
    ]
