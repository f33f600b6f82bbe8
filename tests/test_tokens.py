"""Tokens: content, position tables that sum to the position of every token, and a mask."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from perceiver_core import Tokens
from perceiver_core.positions import Fourier, LearnedGrid

B, C, P = 2, 3, 11
GRID = (5, 7)

laws = settings(max_examples=25, derandomize=True, deadline=None, database=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("grid", [(1,), (13,), (5, 7), (2, 3, 5)], ids=str)
def test_sizes(grid: tuple[int, ...]) -> None:
    content = draw(B, *grid, C)
    bare = Tokens(content)
    assert (bare.grid, bare.num_tokens, bare.dim) == (grid, math.prod(grid), C)
    placed = Tokens(content, position_tables=(draw(*grid, P),))
    assert (placed.grid, placed.num_tokens, placed.dim) == (grid, math.prod(grid), C + P)


def test_dense_without_tables_is_the_content() -> None:
    content = draw(B, *GRID, C)
    tokens = Tokens(content)
    assert tokens.positions() is None and tokens.flat_mask() is None
    assert torch.equal(tokens.materialize(), content.reshape(B, 35, C))


@laws
@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    count=st.integers(1, 4),
    data=st.data(),
)
def test_dense_concatenates_content_and_the_sum_of_tables(
    grid: tuple[int, ...], count: int, data: st.DataObject
) -> None:
    """Token by token: every table is indexed at the token's position, or at 0 along axes of size 1."""
    shapes = [tuple(data.draw(st.sampled_from((1, n))) for n in grid) for _ in range(count)]
    content = draw(B, *grid, C)
    tables = tuple(draw(*shape, P, seed=i) for i, shape in enumerate(shapes))
    rows = []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid)).tolist():
        entries = [t[tuple(min(i, n - 1) for i, n in zip(place, t.shape, strict=False))] for t in tables]
        rows.append(torch.cat([content[(slice(None), *place)], sum(entries).expand(B, P)], dim=-1))
    expected = torch.stack(rows, dim=1)
    torch.testing.assert_close(Tokens(content, position_tables=tables).materialize(), expected, rtol=0.0, atol=1e-12)


def test_several_tables_over_the_whole_grid_are_summed() -> None:
    tables = tuple(draw(*GRID, P, seed=i) for i in range(3))
    tokens = Tokens(draw(B, *GRID, C), position_tables=tables)
    torch.testing.assert_close(tokens.positions(), tables[0] + tables[1] + tables[2], rtol=0.0, atol=1e-14)


def test_separable_and_learned_positions_are_summed() -> None:
    fourier, like = Fourier(num_axes=2, num_bands=3, max_resolution=7), torch.zeros((), dtype=torch.float64)
    learned = LearnedGrid(GRID, fourier.dim).double()
    tables = (*fourier.tables(GRID, like), *learned.tables(GRID, like))
    assert Tokens(draw(B, *GRID, C), position_tables=tables).positions().shape == (*GRID, fourier.dim)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e300])
def test_masked_content_becomes_zero(junk: float) -> None:
    mask = bools(B, *GRID)
    content = draw(B, *GRID, C)
    spoiled = content.masked_fill(~mask[..., None], junk)
    tables = (draw(5, 1, P), draw(1, 7, P))
    dense = Tokens(spoiled, tables, mask).materialize()
    assert torch.equal(dense, Tokens(content, tables, mask).materialize())
    gone = ~mask.flatten(1)
    assert not dense[..., :C][gone].any()
    assert torch.equal(dense[..., :C][~gone], content.flatten(1, 2)[~gone])
    # Their positions stay, so that the output does not depend on the masked content.
    assert torch.equal(dense[..., C:], Tokens(content, tables).materialize()[..., C:])


def test_the_mask_is_flattened_like_the_tokens() -> None:
    mask = bools(B, *GRID)
    flat = Tokens(draw(B, *GRID, C), mask=mask).flat_mask()
    assert flat is not None and flat.shape == (B, 35)
    assert flat[1, 2 * 7 + 3] == mask[1, 2, 3]
    assert torch.equal(flat.reshape(B, *GRID), mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_positions_follow_the_dtype_of_the_content(dtype: torch.dtype) -> None:
    content, tables = draw(B, *GRID, C).to(dtype), (draw(5, 1, P), draw(1, 7, P))
    dense = Tokens(content, tables).materialize()
    assert dense.dtype == dtype
    # Summed in the precision of the tables, then rounded once.
    assert torch.equal(dense[0, :, C:], (tables[0] + tables[1]).flatten(0, 1).to(dtype))


def test_gradients_reach_the_content_and_every_table() -> None:
    content, rows, columns = (x.requires_grad_() for x in (draw(B, *GRID, C), draw(5, 1, P), draw(1, 7, P, seed=1)))
    mask = bools(B, *GRID)
    probe = draw(B, 35, C + P, seed=2)
    d_content, d_rows, d_columns = torch.autograd.grad(
        (Tokens(content, (rows, columns), mask).materialize() * probe).sum(), (content, rows, columns)
    )
    there = mask.flatten(1)[..., None]
    assert torch.equal(d_content.flatten(1, 2), probe[..., :C] * there)
    placed = probe[..., C:].reshape(B, *GRID, P).sum(0)
    torch.testing.assert_close(d_rows, placed.sum(1, keepdim=True), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(d_columns, placed.sum(0, keepdim=True), rtol=0.0, atol=1e-12)


def test_tokens_are_frozen_and_compared_by_identity() -> None:
    tokens = Tokens(draw(B, *GRID, C))
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.content = draw(B, *GRID, C)  # type: ignore[misc]
    assert tokens == tokens and tokens != Tokens(tokens.content)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1.0]], r"content must be a torch.Tensor; got list"),
        (torch.zeros(B, 5, C, dtype=torch.int64), r"content must be floating point; got torch.int64"),
        (torch.zeros(B, 5, C, dtype=torch.bool), r"content must be floating point; got torch.bool"),
    ],
    ids=["list", "integers", "booleans"],
)
def test_content_that_is_not_floating_point_raises(content: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Tokens(content)  # type: ignore[arg-type]


@pytest.mark.refusal
@pytest.mark.parametrize("shape", [(), (B,), (B, C)], ids=str)
def test_content_without_batch_grid_and_channels_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"content must have at least 3 axes \(b \*grid c\); got shape \("):
        Tokens(torch.zeros(shape))


@pytest.mark.refusal
@pytest.mark.parametrize("shape", [(B, 0, C), (B, 5, 0, C), (B, 5, 7, 0)], ids=str)
def test_empty_content_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"content must not be empty; got shape \("):
        Tokens(torch.zeros(shape))


@pytest.mark.refusal
@pytest.mark.parametrize(
    "shapes",
    [[(7, 5, P)], [(5, P)], [(1, 5, 7, P)], [(5, 2, P)], [(5, 1, P), (1, 7, P + 1)], [(5, 1, P), (7, P)], [(P,)]],
    ids=str,
)
def test_tables_that_do_not_broadcast_or_differ_in_width_raise(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(
        ValueError, match=r"position_tables must each broadcast over the grid \(5, 7\) and have one width; got sh"
    ):
        Tokens(draw(B, *GRID, C), position_tables=tuple(torch.zeros(shape) for shape in shapes))


@pytest.mark.refusal
@pytest.mark.parametrize("shape", [(B, 35), GRID, (1, *GRID), (B, 7, 5), (B, *GRID, 1)], ids=str)
def test_a_mask_of_another_shape_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5, 7\), one value a token; got \("):
        Tokens(draw(B, *GRID, C), mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.refusal
def test_a_mask_that_is_not_boolean_raises() -> None:
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor, True = attend; got torch.float32. Convert it"):
        Tokens(draw(B, *GRID, C), mask=torch.ones(B, *GRID))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor, True = attend; got list"):
        Tokens(draw(B, *GRID, C), mask=[True])  # type: ignore[arg-type]


def test_tokens_are_a_pytree_node() -> None:
    """As torch.func, torch.export and FSDP2 see them. Fields that are None have no leaf, and nothing is checked."""
    tokens = Tokens(draw(B, *GRID, C), (draw(5, 1, P), draw(1, 7, P)))
    leaves = tree_leaves(tokens)
    assert [id(leaf) for leaf in leaves] == [id(tokens.content), *map(id, tokens.position_tables)]
    doubled = tree_map(lambda x: 2 * x, tokens)
    assert type(doubled) is Tokens and doubled.mask is None
    torch.testing.assert_close(doubled.materialize(), 2 * tokens.materialize())
    assert tree_map(lambda x: x.ndim, tokens).position_tables == (3, 3)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(Tokens(tokens.content, mask=bools(B, *GRID)))[0]]
    assert paths == [".content", ".mask"]


def test_a_copy_has_the_same_fields() -> None:
    tokens = Tokens(draw(B, *GRID, C), (draw(5, 1, P), draw(1, 7, P)), bools(B, *GRID), {"image": None})
    for again in (copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens)), dataclasses.replace(tokens)):
        assert type(again) is Tokens and again.modalities == {"image": None}
        torch.testing.assert_close(again.materialize(), tokens.materialize(), rtol=0, atol=0)


def test_tokens_on_another_device_and_in_another_dtype():
    content, tables = torch.rand(2, 5, 7, 3), (torch.rand(5, 1, 2), torch.rand(1, 7, 2))
    part = Tokens(torch.rand(2, 4, 3))
    tokens = Tokens(content, tables, torch.rand(2, 5, 7) > 0.5, {"image": part, "label": None})
    moved = tokens.to("meta", torch.float64)
    tensors = [moved.content, *moved.position_tables, moved.modalities["image"].content]
    assert all(x.is_meta and x.dtype == torch.float64 for x in tensors)
    assert moved.mask.is_meta and moved.mask.dtype == torch.bool and moved.modalities["label"] is None
    same = tokens.to(torch.float32)
    assert torch.equal(same.materialize(), tokens.materialize()) and Tokens(content).to("cpu").modalities is None
