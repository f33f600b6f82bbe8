"""Reads of a grid: the formula written out in float64, forward and backward, and the laws that reads obey."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perceiver_core.kernels.grid import GridRead, eager, gpu, native, operator, read_grid
from tests.memory import Largest

laws = settings(max_examples=25, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**16)
grids = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=["float64", "float32"]
)

Inputs = list[Tensor]  # content_queries, axis_queries, content, scale
NAMES = ("content", "marginals", "lse", "d content_queries", "d axis_queries", "d content", "d scale")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def some_inputs(
    *grid: int,
    batch: int = 2,
    asking: int | None = None,
    heads: int = 1,
    queries: int = 5,
    channels: int = 3,
    seed: int = 0,
) -> Inputs:
    """Queries of scores of about 1; `asking` is their batch, that of the content unless given."""
    asked = (batch if asking is None else asking, heads, queries)
    return [
        draw(*asked, channels, seed=seed) / channels**0.5,
        draw(*asked, sum(grid), seed=seed + 1) / len(grid) ** 0.5,
        draw(batch, channels, *grid, seed=seed + 2),
        draw(batch, *grid, seed=seed + 3).abs() + 0.3,
    ]


def along(table: Tensor, axis: int, axes: int) -> Tensor:
    return table.reshape(*table.shape[:-1], *(-1 if other == axis else 1 for other in range(axes)))


def formula(a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None = None) -> GridRead:
    """Every score and every weight written out."""
    grid = content.shape[2:]
    if mask is not None:
        content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
    sums = torch.einsum("bhqc,bc...->bhq...", a.expand(len(content), -1, -1, -1), content)
    for axis, table in enumerate(u.split(list(grid), -1)):
        sums = sums + along(table, axis, len(grid))
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


def results(read, inputs: Inputs, mask: Tensor | None = None) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The read and, for random gradients of all of it, those of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = read(*leaves, mask)
    given = [draw(*x.shape, seed=11 + i).to(x.dtype) for i, x in enumerate(outputs)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, given)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """To a tolerance relative to the largest value of each tensor."""
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        largest = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 1.0
        torch.testing.assert_close(
            a.double(), e.double(), rtol=0.0, atol=tolerance * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


def check(inputs: Inputs, dtype: torch.dtype, tolerance: float, mask: Tensor | None = None) -> None:
    inputs = [x.to(dtype) for x in inputs]
    actual = results(read_grid, inputs, mask)
    assert all(x.dtype == dtype for x in actual)
    agree(actual, results(formula, [x.double() for x in inputs], mask), tolerance)


class OnGPU:
    """The Triton kernels, on a GPU where there is one, else interpreted."""

    @staticmethod
    def forward(*given: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(x.cpu() for x in chosen(given).forward(*(moved(x) for x in given)))

    @staticmethod
    def backward(*given: Tensor | bool | None) -> tuple[Tensor, ...]:
        return tuple(x.cpu() for x in chosen(given).backward(*(moved(x) for x in given)))


def chosen(given: tuple[Tensor | bool | None, ...]) -> Any:
    """Plain PyTorch for more channels than the kernels take."""
    return gpu if given[0].shape[-1] <= gpu.WIDEST else eager  # type: ignore[union-attr]


def moved(x: Tensor | bool | None) -> Any:
    return x.cuda() if isinstance(x, Tensor) and torch.cuda.is_available() else x


@contextmanager
def taking(route: str) -> Iterator[None]:
    """The compiled loop where there is a compiler; Triton; plain PyTorch, all at once or a few rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if route != "compiled":
            patch.setattr(operator, "_kernels", lambda *_: OnGPU if route == "triton" else eager)
        if route == "slabs":
            patch.setattr(eager, "PIECE", 23)
        yield


@pytest.fixture(params=["compiled", "eager", "slabs", pytest.param("triton", marks=pytest.mark.triton)])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        pytest.importorskip("triton")
        from tests.triton_runs import why_not

        if reason := why_not():
            pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "compiled" and native.library() is None:
            pytest.skip("no compiler")
    with taking(request.param):
        yield


routes = pytest.mark.usefixtures("route")

GRIDS = [(13,), (7, 11), (3, 5, 7), (2, 3, 5, 7), (1,), (1, 1), (1, 13), (13, 1), (5, 1, 3), (1, 1, 1, 2), (2, 33, 3)]
LONG = [(257,), (521,), (3, 257), (2, 3, 521)]  # longer than a tile


@routes
@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("grid", [*GRIDS, *LONG], ids=str)
def test_every_grid(grid: tuple[int, ...], masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    check(some_inputs(*grid, heads=3), dtype, tolerance, bools(2, *grid, seed=7) if masked else None)


@routes
@dtypes
@pytest.mark.parametrize("asking", [1, 3], ids=["shared", "own"])
@pytest.mark.parametrize("queries", [1, 17, 33])
@pytest.mark.parametrize("channels", [1, 4, 7, 20, 65])
def test_every_size(channels: int, queries: int, asking: int, dtype: torch.dtype, tolerance: float) -> None:
    """Blocks are of 16 queries, channels are taken by fours, and many make a tile shorter."""
    inputs = some_inputs(5, 101, batch=3, asking=asking, heads=2, queries=queries, channels=channels)
    check(inputs, dtype, (2 if channels > 7 else 1) * tolerance, bools(3, 5, 101))  # sums of as many terms


@routes
@dtypes
def test_channels_that_fill_a_tile_alone(dtype: torch.dtype, tolerance: float) -> None:
    check(some_inputs(3, 37, channels=521), dtype, 4 * tolerance)  # sums of as many terms


@routes
@dtypes
@pytest.mark.parametrize("asking", [1, 2], ids=["shared", "own"])
@pytest.mark.parametrize("held", [0.0, torch.nan, torch.inf, -torch.inf])
def test_masked_tokens_are_inert(held: float, asking: int, dtype: torch.dtype, tolerance: float) -> None:
    """One sample is masked wholly, another in part: nothing is read there, and no gradient goes there."""
    a, u, content, scale = some_inputs(3, 5, 7, asking=asking)
    mask = bools(2, 3, 5, 7)
    mask[1] = False
    content, scale = content.masked_fill(~mask[:, None], held), scale.masked_fill(~mask, held)
    check([a, u, content, scale], dtype, tolerance, mask)
    read, marginals, lse, d_a, d_u, d_content, d_scale = results(read_grid, [a, u, content, scale], mask)
    assert not read[1].any() and not marginals[1].any() and (lse[1] == -torch.inf).all()
    assert not d_content[:, :, ~mask[0]][0].any() and not d_content[1].any() and not d_scale[~mask].any()
    assert asking == 1 or (not d_a[1].any() and not d_u[1].any())


@routes
@pytest.mark.parametrize("sign", [1, -1])
def test_one_token_of_a_score_of_ten_thousand(sign: int) -> None:
    """The scores are exactly 1e4, 9600 and -1e4 times the sign, far enough apart in float32 for one token to win."""
    content = torch.full((1, 1, 3, 523), 96.0)
    content[0, 0, 1, 509], content[0, 0, 2, 7] = 100.0, -100.0
    a, u = torch.full((1, 1, 1, 1), 100.0 * sign), torch.zeros(1, 1, 1, 526)
    found = results(read_grid, [a, u, content, torch.ones(1, 3, 523)])
    assert all(x.isfinite().all() for x in found)
    read, marginals, lse = (x.flatten() for x in found[:3])
    torch.testing.assert_close(read, torch.tensor([100.0 * sign]), rtol=0.0, atol=0.0)
    torch.testing.assert_close(lse, torch.tensor([1e4]), rtol=2e-7, atol=0.0)
    row, column = (1, 509) if sign > 0 else (2, 7)
    assert marginals.nonzero().flatten().tolist() == [row, 3 + column]
    torch.testing.assert_close(marginals[marginals > 0], torch.ones(2), rtol=0.0, atol=0.0)


@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4, 1e-4])
def test_scores_of_any_size_give_no_nan(size: float, dtype: torch.dtype) -> None:
    a, u, content, scale = (x.to(dtype) for x in some_inputs(7, 263, queries=17))
    found = results(read_grid, [size * a, size * u, content, scale])
    assert all(x.isfinite().all() for x in found)
    sums, expected = found[1][..., :7].sum(-1), found[1][..., 7:].sum(-1)
    torch.testing.assert_close(sums, expected)


@routes
@dtypes
@pytest.mark.parametrize("slope", [1, -1], ids=["rising", "falling"])
def test_scores_that_rise_or_fall_over_the_grid(slope: int, dtype: torch.dtype, tolerance: float) -> None:
    """The sums are scaled anew whenever a score exceeds all before it by much."""
    a, u, content, scale = some_inputs(11, 37)
    u[..., :11] += slope * torch.linspace(-60, 60, 11, dtype=torch.float64)
    check([a, u, content, torch.ones_like(scale)], dtype, tolerance * 20)


@routes
def test_scales_of_zero_and_below() -> None:
    a, u, content, scale = some_inputs(5, 17)
    scale[0], scale[1, 2] = -scale[0], 0.0
    check([a, u, content, scale], torch.float64, 1e-10)


@routes
@dtypes
def test_inputs_that_are_not_contiguous(dtype: torch.dtype, tolerance: float) -> None:
    a, u, content, scale = some_inputs(7, 11, heads=3)
    inputs = [
        a.mT.contiguous().mT,
        torch.cat([u, u], dim=-1)[..., : u.shape[-1]],
        content.movedim(1, -1).contiguous().movedim(-1, 1),
        scale.mT.contiguous().mT,
    ]
    mask = bools(2, 11, 7).mT
    assert not any(x.is_contiguous() for x in (*inputs, mask))
    check(inputs, dtype, tolerance, mask)
    check([a, u, content[:1].expand(2, -1, -1, -1), scale[:1].expand(2, -1, -1)], dtype, tolerance, mask)


@routes
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradients_of_some_inputs_alone(wanted: tuple[bool, ...]) -> None:
    """Those of the tokens are not computed where nobody asks; the others are then the same."""
    inputs = some_inputs(5, 7)
    everything = results(read_grid, inputs)[3:]
    leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    outputs = read_grid(*leaves)
    assert all(x.requires_grad == any(wanted) for x in outputs)
    if any(wanted):
        torch.autograd.backward(outputs, [draw(*x.shape, seed=11 + i) for i, x in enumerate(outputs)])
    for leaf, want, gradient in zip(leaves, wanted, everything, strict=True):
        torch.testing.assert_close(leaf.grad, gradient if want else None, rtol=0.0, atol=1e-14)


@routes
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(masked: bool) -> None:
    inputs = [x.requires_grad_() for x in some_inputs(2, 3, queries=2, channels=2, asking=1)]
    mask = torch.tensor([[[True, False, True], [False, True, True]]] * 2) if masked else None
    assert torch.autograd.gradcheck(lambda *xs: tuple(read_grid(*xs, mask)), inputs)


@routes
def test_autocast_does_not_narrow_the_sums() -> None:
    inputs = [x.float() for x in some_inputs(5, 7)]
    outside = results(read_grid, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(read_grid, inputs)
    torch.testing.assert_close(inside, outside, rtol=0.0, atol=0.0)


@routes
def test_forward_mode_is_refused_or_right() -> None:
    """Never a tangent of zero."""
    a, u, content, scale = some_inputs(5, 7)
    along_a = draw(*a.shape, seed=9)

    def tangent(read) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.func.jvp(lambda a: read(a, u, content, scale)[0], (a,), (along_a,))[1]

    try:
        found = tangent(read_grid)
    except (NotImplementedError, RuntimeError):
        return
    torch.testing.assert_close(found, tangent(formula))


@routes
def test_it_is_differentiable_once_and_says_so() -> None:
    inputs = [x.requires_grad_() for x in some_inputs(5, 7)]
    (d_a,) = torch.autograd.grad(read_grid(*inputs).content.square().sum(), inputs[0], create_graph=True)
    for loss in (d_a.sum(), d_a.square().sum()):
        with pytest.raises(RuntimeError, match=r"read_grid|once"):
            torch.autograd.grad(loss, inputs[1], retain_graph=True)


# Transforms

AXES = [(0, 0, 0, 0), (None, 0, 0, 0), (0, None, None, None), (None, None, 0, 0), (0, 0, None, 0)]


@routes
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("asking", [1, 2], ids=["shared", "own"])
@pytest.mark.parametrize("mapped", AXES, ids=str)
def test_vmap_of_gradients_equals_a_loop(mapped: tuple[int | None, ...], asking: int, masked: bool) -> None:
    """Whichever inputs differ between samples."""
    inputs = some_inputs(5, 7, asking=asking)
    many = [draw(3, *x.shape, seed=i) if m == 0 else x for i, (x, m) in enumerate(zip(inputs, mapped, strict=True))]
    mask = bools(2, 5, 7) if masked else None

    def loss(*xs: Tensor) -> Tensor:
        return torch.stack([x.square().sum() for x in read_grid(*xs, mask)]).sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), mapped)(*many)
    for i in range(3):
        one = [(x[i] if m == 0 else x).detach().requires_grad_() for x, m in zip(many, mapped, strict=True)]
        torch.testing.assert_close([x[i] for x in gradients], list(torch.autograd.grad(loss(*one), one)))


@routes
def test_vmap_over_masks() -> None:
    inputs, many = some_inputs(5, 7), bools(3, 2, 5, 7)
    found = torch.vmap(lambda mask: tuple(read_grid(*inputs, mask)))(many)
    wanted = [read_grid(*inputs, mask) for mask in many]
    torch.testing.assert_close(found, tuple(torch.stack(x) for x in zip(*wanted, strict=True)), rtol=0.0, atol=1e-14)


@routes
def test_jacobians() -> None:
    a, u, content, scale = some_inputs(2, 3, queries=2)
    found, wanted = (torch.func.jacrev(lambda a, f=f: f(a, u, content, scale)[0])(a) for f in (read_grid, formula))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-12)


# The operators


@routes
@pytest.mark.compile
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_operators_are_what_they_say(masked: bool) -> None:
    inputs = some_inputs(5, 7)
    mask = bools(2, 5, 7) if masked else None
    torch.library.opcheck(operator._read_grid, (*(x.requires_grad_() for x in inputs), mask))
    plain = [x.detach() for x in inputs]
    read, marginals, lse, base, total = operator._read_grid(*plain, mask)
    for tokens in (True, False):
        torch.library.opcheck(operator._read_grid_backward, (*plain, mask, base, total, read, marginals, lse, tokens))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("route", "threads")
@pytest.mark.parametrize("route", ["compiled"], indirect=True)
@pytest.mark.parametrize("batch", [1, 3])
def test_results_are_the_same_bits_for_any_number_of_threads(batch: int) -> None:
    """Of the compiled loop; products of matrices are not always."""
    inputs, mask = [x.float() for x in some_inputs(13, 67, batch=batch, heads=2, queries=37)], bools(batch, 13, 67)
    found = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        found.append(results(read_grid, inputs, mask))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0)


# Memory


@pytest.mark.parametrize("asking", [1, 2], ids=["shared", "own"])
def test_nothing_of_queries_times_tokens_is_ever_made(asking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PyTorch the largest tensor is that of the marginals, a gradient of the content, or a slab's scores."""
    inputs, mask = some_inputs(101, 11, asking=asking, queries=53), bools(2, 101, 11)
    weights, marginals_of, gradient = 2 * 53 * 101 * 11, 2 * 53 * (101 + 11), 2 * 3 * 101 * 11
    monkeypatch.setattr(eager, "PIECE", 53 * 11)
    with Largest() as largest:
        read, marginals, base, total = eager.forward(*inputs, mask)
        eager.backward(*inputs, mask, base, total, read, marginals, total, True)
    assert largest.size <= max(marginals_of, gradient) < weights / 9
    with Largest() as largest:
        formula(*inputs, mask)
    assert largest.size >= weights  # which the measure does see


READ_AND_REPORT = """
import re, sys, torch
from pathlib import Path
from perceiver_core.kernels.grid import native, read_grid

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def read(*grid):
    content = torch.randn(1, 1, *grid, requires_grad=True)
    a, u = torch.randn(1, 1, 64, 1, requires_grad=True), torch.randn(1, 1, 64, sum(grid), requires_grad=True)
    got = read_grid(a, u, content, torch.ones(1, *grid, requires_grad=True))
    (got.content.sum() + got.marginals.square().sum() + got.lse.sum()).backward()
    assert content.grad.isfinite().all()

read(11, 13)
before = peak()
read(1741, 1747)
print(native.library() is not None, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_the_compiled_loop_needs_little_more_than_the_tokens_and_their_gradients() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_AND_REPORT], capture_output=True, text=True, check=True
    )
    compiled, needed = run.stdout.split()
    if compiled != "True":
        pytest.skip("no compiler")
    tokens = 1741 * 1747
    assert 4 * 4 * tokens < int(needed) < 64 * tokens * 4 / 4  # the weights would take four times as much


# Laws


@routes
def test_a_read_serves_any_grid_with_the_same_tokens() -> None:
    """With the same for every place, a grid is a list: content and lse do not depend on its shape."""
    a, _, content, scale = some_inputs(6, 35)
    reads = []
    for grid in ((210,), (6, 35), (2, 3, 5, 7)):
        u = torch.full((2, 1, 5, sum(grid)), 1 / len(grid), dtype=torch.float64)
        reads.append(read_grid(a, u, content.reshape(2, 3, *grid), scale.reshape(2, *grid)))
    for other in reads[1:]:
        torch.testing.assert_close(other.content, reads[0].content, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(other.lse, reads[0].lse, rtol=0.0, atol=1e-12)


@laws
@given(seed=seeds, grid=grids, data=st.data(), route=st.sampled_from(["compiled", "slabs"]))
def test_places_have_no_order(seed: int, grid: tuple[int, ...], data: st.DataObject, route: str) -> None:
    """Places along an axis in another order, with what is asked of them: their marginals are, and nothing else."""
    a, u, content, scale = some_inputs(*grid, seed=seed)
    mask = bools(2, *grid, seed=seed)
    axis = data.draw(st.integers(0, len(grid) - 1))
    order = torch.tensor(data.draw(st.permutations(range(grid[axis]))))
    start = sum(grid[:axis])
    places = torch.arange(sum(grid))
    places[start : start + grid[axis]] = start + order
    with taking(route):
        read = read_grid(a, u, content, scale, mask)
        other = read_grid(
            a,
            u[..., places],
            *(x.index_select(axis - len(grid), order) for x in (content, scale, mask)),
        )
    expected = read._replace(marginals=read.marginals[..., places])
    torch.testing.assert_close(tuple(other), tuple(expected), rtol=0.0, atol=1e-12)


@laws
@given(seed=seeds, grid=grids, data=st.data(), route=st.sampled_from(["compiled", "slabs"]))
def test_parts_merge_into_the_whole(seed: int, grid: tuple[int, ...], data: st.DataObject, route: str) -> None:
    """A grid cut in two along an axis: each part counts as much as the exponential of its lse."""
    a, u, content, scale = some_inputs(*grid, seed=seed)
    mask = bools(2, *grid, seed=seed)
    axis = data.draw(st.integers(0, len(grid) - 1))
    cut = data.draw(st.integers(0, grid[axis]))
    tables = list(u.split(list(grid), -1))
    pieces = [piece for piece in (slice(0, cut), slice(cut, grid[axis])) if piece.stop > piece.start]
    reads = []
    with taking(route):
        whole = read_grid(a, u, content, scale, mask)
        for piece in pieces:
            here = [table[..., piece] if i == axis else table for i, table in enumerate(tables)]
            part = [x.narrow(axis - len(grid), piece.start, piece.stop - piece.start) for x in (content, scale, mask)]
            reads.append(read_grid(a, torch.cat(here, -1), *part))
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


@routes
def test_sums_along_every_axis_agree_with_the_whole() -> None:
    """The marginals of each axis sum to the mean scale, which is 1 where the scale is 1."""
    a, u, content, scale = some_inputs(3, 5, 7)
    for table in read_grid(a, u, content, torch.ones_like(scale)).marginals.split([3, 5, 7], -1):
        torch.testing.assert_close(table.sum(-1), torch.ones(2, 1, 5, dtype=torch.float64))


class TestRefusals:
    """The compiled loop looks at memory, not at shapes, so nothing else may reach it, by any way of calling."""

    good: ClassVar = {
        "content_queries": (2, 3, 5, 7),
        "axis_queries": (2, 3, 5, 11 + 13),
        "content": (2, 7, 11, 13),
        "scale": (2, 11, 13),
    }

    @pytest.mark.parametrize(
        "name, shape",
        [
            ("content_queries", (2, 3, 5, 6)),
            ("content_queries", (3, 3, 5, 7)),
            ("content_queries", (2, 15, 7)),
            ("axis_queries", (2, 3, 5, 23)),
            ("axis_queries", (1, 3, 5, 24)),
            ("axis_queries", (2, 3, 4, 24)),
            ("content", (2, 7)),
            ("content", (2, 0, 11, 13)),
            ("content", (2, 7, 11, 0)),
            ("scale", (1, 11, 13)),
            ("scale", (2, 143)),
        ],
    )
    @pytest.mark.parametrize("call", [read_grid, torch.ops.perceiver_core.read_grid], ids=["function", "operator"])
    def test_refused_shapes(self, call, name, shape):
        given = [torch.ones(size) for size in {**self.good, name: shape}.values()]
        with pytest.raises(ValueError, match="must"):
            call(*given, None)

    @pytest.mark.parametrize("name", list(good))
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
    def test_refused_dtypes(self, name, dtype):
        given = {
            key: torch.ones(size, dtype=dtype if key == name else torch.float32) for key, size in self.good.items()
        }
        with pytest.raises(TypeError, match="must be"):
            read_grid(*given.values())

    @pytest.mark.parametrize(
        "mask", [torch.ones(2, 11, 13), torch.ones(1, 1, 1, dtype=torch.bool)], ids=["dtype", "shape"]
    )
    def test_refused_masks(self, mask):
        given = [torch.ones(size) for size in self.good.values()]
        with pytest.raises((TypeError, ValueError), match="mask must"):
            read_grid(*given, mask)


def test_gradients_where_nothing_asks_are_zero():
    content, scale = torch.ones(2, 7, 11, 13, requires_grad=True), torch.ones(2, 11, 13, requires_grad=True)
    read = read_grid(torch.ones(2, 3, 0, 7), torch.ones(2, 3, 0, 24), content, scale)
    (read.content.sum() + read.marginals.sum() + read.lse.sum()).backward()
    assert content.grad.abs().max() == 0 and scale.grad.abs().max() == 0


def test_a_nan_with_any_payload_is_seen():
    odd = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    content = torch.ones(1, 1, 2, 3)
    content[0, 0, 1, 2] = odd
    read = read_grid(torch.ones(1, 1, 5, 1), torch.zeros(1, 1, 5, 5), content, torch.ones(1, 2, 3))
    assert read.content.isnan().all() and read.lse.isnan().all()
