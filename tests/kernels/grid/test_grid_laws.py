"""Laws that reads of a grid obey: order of positions, merging of parts, equal sums along every axis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_core.kernels.grid import read_grid
from tests.kernels.grid.backends import all_backends, use_backend
from tests.kernels.grid.cases import random_inputs, random_mask

laws = settings(max_examples=25, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**16)
grids = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
backends = st.sampled_from(["cpp", "slabs"])


@all_backends
def test_the_same_tokens_in_any_grid_read_the_same() -> None:
    """If all positions have the same terms, a grid is a list: content and lse do not depend on its shape."""
    content_queries, _, content, scale = random_inputs(6, 35)
    reads = []
    for grid in ((210,), (6, 35), (2, 3, 5, 7)):
        axis_queries = torch.full((2, 1, 5, sum(grid)), 1 / len(grid), dtype=torch.float64)
        reads.append(read_grid(content_queries, axis_queries, content.reshape(2, 3, *grid), scale.reshape(2, *grid)))
    for other in reads[1:]:
        torch.testing.assert_close(other.content, reads[0].content, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(other.lse, reads[0].lse, rtol=0.0, atol=1e-12)


@laws
@given(seed=seeds, grid=grids, data=st.data(), backend=backends)
def test_positions_have_no_order(seed: int, grid: tuple[int, ...], data: st.DataObject, backend: str) -> None:
    """Permuting the positions along an axis, with their terms, permutes their marginals and changes nothing else."""
    content_queries, axis_queries, content, scale = random_inputs(*grid, seed=seed)
    mask = random_mask(2, *grid, seed=seed)
    axis = data.draw(st.integers(0, len(grid) - 1))
    order = torch.tensor(data.draw(st.permutations(range(grid[axis]))))
    start = sum(grid[:axis])
    positions = torch.arange(sum(grid))
    positions[start : start + grid[axis]] = start + order
    with use_backend(backend):
        read = read_grid(content_queries, axis_queries, content, scale, mask)
        permuted = [x.index_select(axis - len(grid), order) for x in (content, scale, mask)]
        other = read_grid(content_queries, axis_queries[..., positions], *permuted)
    expected = read._replace(marginals=read.marginals[..., positions])
    torch.testing.assert_close(tuple(other), tuple(expected), rtol=0.0, atol=1e-12)


@laws
@given(seed=seeds, grid=grids, data=st.data(), backend=backends)
def test_parts_merge_into_the_whole(seed: int, grid: tuple[int, ...], data: st.DataObject, backend: str) -> None:
    """A grid cut in two along an axis: each part counts as much as the exponential of its lse."""
    content_queries, axis_queries, content, scale = random_inputs(*grid, seed=seed)
    mask = random_mask(2, *grid, seed=seed)
    axis = data.draw(st.integers(0, len(grid) - 1))
    cut = data.draw(st.integers(0, grid[axis]))
    tables = list(axis_queries.split(list(grid), -1))
    pieces = [piece for piece in (slice(0, cut), slice(cut, grid[axis])) if piece.stop > piece.start]
    reads = []
    with use_backend(backend):
        whole = read_grid(content_queries, axis_queries, content, scale, mask)
        for piece in pieces:
            part_tables = [table[..., piece] if i == axis else table for i, table in enumerate(tables)]
            part = [x.narrow(axis - len(grid), piece.start, piece.stop - piece.start) for x in (content, scale, mask)]
            reads.append(read_grid(content_queries, torch.cat(part_tables, -1), *part))
    lse = torch.stack([read.lse for read in reads]).logsumexp(0)
    torch.testing.assert_close(lse, whole.lse, rtol=0.0, atol=1e-12)
    shares = [(read.lse - lse).exp().nan_to_num(0.0)[..., None] for read in reads]
    merged = sum(share * read.content for share, read in zip(shares, reads, strict=True))
    torch.testing.assert_close(merged, whole.content, rtol=0.0, atol=1e-12)
    for i, expected in enumerate(whole.marginals.split(list(grid), -1)):
        parts = []
        for piece, share, read in zip(pieces, shares, reads, strict=True):
            sizes = [piece.stop - piece.start if j == axis else size for j, size in enumerate(grid)]
            parts.append(share * read.marginals.split(sizes, -1)[i])
        actual = torch.cat(parts, -1) if i == axis else sum(parts)
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)


@all_backends
@pytest.mark.interpreted
def test_marginals_of_every_axis_sum_to_the_mean_scale() -> None:
    """The mean scale is 1 where the scale is 1."""
    content_queries, axis_queries, content, scale = random_inputs(3, 5, 7)
    read = read_grid(content_queries, axis_queries, content, torch.ones_like(scale))
    for table in read.marginals.split([3, 5, 7], -1):
        torch.testing.assert_close(table.sum(-1), torch.ones(2, 1, 5, dtype=torch.float64))
