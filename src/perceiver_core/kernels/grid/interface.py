"""Interface of the backends of `read_grid`: inputs, outputs and the warning of a slower fallback.

A backend is a module with the functions of `Backend`: `cpp` on the CPU, `triton` on CUDA, and `eager`, the reference in
plain PyTorch. `operator` validates the tensors and makes them contiguous before a backend sees them.

Axes: `b` samples, `h` heads, `q` queries, `c` channels, `*grid` the axes of the grid, and `axis_positions` the
positions along all axes of the grid, one axis after another, so that its size is the sum of the grid's sizes. `#b` is
the number of samples, or 1 where all samples share their queries.
"""

from __future__ import annotations

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


class Saved(NamedTuple):
    """Softmax statistics that the forward pass saves: the log-sum-exp of the scores is `(base + log2(total)) ln 2`.

    `base` is a number near the largest score of a query, times log2(e), and 0 for queries that attend to nothing;
    `total` is the sum of 2^(score log2(e) - base).
    """

    base: Float[Tensor, "b h q"]
    total: Float[Tensor, "b h q"]


class GridOutputs(NamedTuple):
    """Results of a forward pass; `content` and `marginals` are normalized."""

    content: Float[Tensor, "b h q c"]
    marginals: Float[Tensor, "b h q axis_positions"]
    saved: Saved


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the outputs; `d_read` is that of `GridOutputs.content`.

    `offset` is the part of the gradient of a score that all tokens of a query share: d_lse - sum(d_read content)
    - sum(d_marginals marginals).
    """

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

    def backward(
        self, inputs: GridInputs, saved: Saved, upstream: Upstream, needs_token_gradients: bool
    ) -> GridGradients:
        """Recompute the softmax weights and return the gradients of the inputs."""
        ...


class GridFallbackWarning(RuntimeWarning):
    """Warning that grid reads run on a slower backend than the device allows; results are equal."""
