"""Inputs of `read_grid`, and its formula written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from perceiver_core.kernels.grid import GridRead, read_grid

both_dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=["float64", "float32"]
)

Inputs = list[Tensor]  # content_queries, axis_queries, content, scale
NAMES = ("content", "marginals", "lse", "d content_queries", "d axis_queries", "d content", "d scale")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def random_inputs(
    *grid: int,
    batch: int = 2,
    query_batch: int | None = None,
    heads: int = 1,
    queries: int = 5,
    channels: int = 3,
    seed: int = 0,
) -> Inputs:
    """Returns inputs with scores of about 1; `query_batch` is the batch of the queries, by default `batch`."""
    leading = (batch if query_batch is None else query_batch, heads, queries)
    return [
        normal(*leading, channels, seed=seed) / channels**0.5,
        normal(*leading, sum(grid), seed=seed + 1) / len(grid) ** 0.5,
        normal(batch, channels, *grid, seed=seed + 2),
        normal(batch, *grid, seed=seed + 3).abs() + 0.3,
    ]


def expand_along(table: Tensor, axis: int, axes: int) -> Tensor:
    return table.reshape(*table.shape[:-1], *(-1 if other == axis else 1 for other in range(axes)))


def formula(
    content_queries: Tensor, axis_queries: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None = None
) -> GridRead:
    """Computes the read with every score and every weight in memory."""
    grid = content.shape[2:]
    if mask is not None:
        content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
    sums = torch.einsum("bhqc,bc...->bhq...", content_queries.expand(len(content), -1, -1, -1), content)
    for axis, table in enumerate(axis_queries.split(list(grid), -1)):
        sums = sums + expand_along(table, axis, len(grid))
    scores = sums * scale[:, None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    top = scores.detach().flatten(3).amax(-1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    exps = (scores - top.reshape(*top.shape, *(1 for _ in grid))).exp()
    total = exps.flatten(3).sum(-1)
    norm = total.where(total > 0, 1.0)
    p = exps / norm.reshape(*norm.shape, *(1 for _ in grid)) * scale[:, None, None]
    others = [[3 + other for other in range(len(grid)) if other != axis] for axis in range(len(grid))]
    return GridRead(
        torch.einsum("bhq...,bc...->bhqc", p, content),
        torch.cat([p.sum(dims) if dims else p for dims in others], dim=-1),
        (top + norm.log()).where(total > 0, -torch.inf),
    )


def outputs_and_gradients(read: Callable[..., GridRead], inputs: Inputs, mask: Tensor | None = None) -> list[Tensor]:
    """Returns the read and the gradients of all inputs, for random upstream gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = read(*leaves, mask)
    upstream = [normal(*x.shape, seed=11 + i).to(x.dtype) for i, x in enumerate(outputs)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compares to a tolerance relative to the largest value of each tensor."""
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        largest = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 1.0
        torch.testing.assert_close(
            a.double(), e.double(), rtol=0.0, atol=tolerance * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_against_formula(inputs: Inputs, dtype: torch.dtype, tolerance: float, mask: Tensor | None = None) -> None:
    inputs = [x.to(dtype) for x in inputs]
    actual = outputs_and_gradients(read_grid, inputs, mask)
    assert all(x.dtype == dtype for x in actual)
    assert_all_close(actual, outputs_and_gradients(formula, [x.double() for x in inputs], mask), tolerance)
