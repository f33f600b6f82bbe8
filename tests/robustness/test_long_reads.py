"""The rounding error of a read in float32 grows with the number of tokens as docs/concepts/numerics.md states.

`python -m benchmarks.rounding` measures it for up to ten million tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import rounding
from perceiver_core import masks
from perceiver_core.kernels import chunked
from tests.robustness.rounding import CONSTANT, LANES

pytestmark = pytest.mark.no_shape_checks  # shapes are checked by the tests of each part

CHUNK = 4096  # keys in a chunk of `kernels.chunked`
TILE = 256  # tokens in a tile of the compiled loop
SLAB = 2**20  # tokens in a slab of a read in factored form


def in_order(num_tokens: int, longest_axis: int) -> float:
    """Return the growth for PyTorch's kernels, which add terms one after the other in a few partial sums."""
    return num_tokens / LANES


def in_blocks(num_tokens: int, longest_axis: int) -> float:
    return CHUNK / LANES + num_tokens / CHUNK


def in_tiles(num_tokens: int, longest_axis: int) -> float:
    """Return the growth for sums of tiles, followed by a product with the table of values of an axis."""
    return TILE / LANES + num_tokens / TILE + min(longest_axis, SLAB) / LANES


LAWS: dict[str, Callable[[int, int], float]] = {
    "structured": in_tiles,
    "factored": in_order,
    "dense, `sdpa`": in_order,
    "dense, `chunked`": in_blocks,
}


def limit(name: str, num_tokens: int, longest_axis: int) -> float:
    """Return the bound in units of the unit roundoff. The sums of weights and of values both have this error."""
    return 2 * (2 * CONSTANT + LAWS[name](num_tokens, longest_axis))


@pytest.mark.parametrize(
    ("num_tokens", "names"), [(1000, LAWS), (100_000, LAWS), (300_000, ("structured", "dense, `chunked`"))]
)
def test_errors_grow_as_the_order_of_sums_implies(num_tokens, names):
    for grid in rounding.grids(num_tokens).values():
        read, x, tokens = rounding.setup(grid)
        expected = rounding.exact(read, x, tokens)
        for name in names:
            error = rounding.error(name, read, x, tokens, expected)
            assert 1 < error < limit(name, num_tokens, max(grid)), (name, grid, error)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, *, mask: masks.Mask | None = None) -> Tensor:
    """Compute attention with sums that add one term after the other, by NumPy's `cumsum`."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5).exp()
    sums = [np.cumsum((weights[0, h, :, :, None] * v[0, h]).numpy(), axis=1)[:, -1] for h in range(q.shape[1])]
    total = np.cumsum(weights[0].numpy(), axis=-1)[..., -1:]
    return torch.from_numpy(np.stack(sums) / total)[None]


def test_the_bound_of_sums_in_blocks_reveals_sums_one_by_one(monkeypatch):
    grid = rounding.grids(100_000)["line"]
    read, x, tokens = rounding.setup(grid)
    expected = rounding.exact(read, x, tokens)
    strategy = rounding.STRATEGIES["dense, `chunked`"][0]
    errors = {}
    for name, kernel in (("chunked", chunked), ("one by one", one_by_one)):
        monkeypatch.setitem(rounding.STRATEGIES, "dense, `chunked`", (strategy, kernel))
        errors[name] = rounding.error("dense, `chunked`", read, x, tokens, expected)
    assert errors["chunked"] < errors["one by one"] / 5, errors
