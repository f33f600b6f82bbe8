"""`read_grid` with every backend against the formula written out in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from perceiver_core.kernels.grid import operator, read_grid
from tests.kernels.grid.backends import all_backends
from tests.kernels.grid.cases import (
    both_dtypes,
    check_against_formula,
    outputs_and_gradients,
    random_inputs,
    random_mask,
)

GRIDS = [(13,), (7, 11), (3, 5, 7), (2, 3, 5, 7), (1,), (1, 1), (1, 13), (13, 1), (5, 1, 3), (1, 1, 1, 2), (2, 33, 3)]
LONGER_THAN_A_TILE = [(257,), (521,), (3, 257), (2, 3, 521)]
INTERPRETED_GRIDS = [(13,), (7, 11), (3, 5, 7), (1,), (1, 1), (1, 13), (5, 1, 3)]


@all_backends
@pytest.mark.interpreted(grid=INTERPRETED_GRIDS, masked=[True], dtype=[torch.float64])
@pytest.mark.interpreted(grid=INTERPRETED_GRIDS, masked=[False], dtype=[torch.float32])
@pytest.mark.interpreted(grid=[(2, 33, 3), (3, 257)], masked=[True], dtype=[torch.float64])
@both_dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("grid", [*GRIDS, *LONGER_THAN_A_TILE], ids=str)
def test_every_grid(grid: tuple[int, ...], masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    mask = random_mask(2, *grid, seed=7) if masked else None
    check_against_formula(random_inputs(*grid, heads=3), dtype, tolerance, mask)


@all_backends
@pytest.mark.interpreted(channels=[4], queries=[33], query_batch=[1], dtype=[torch.float32])
@pytest.mark.interpreted(channels=[1], queries=[17], query_batch=[3], dtype=[torch.float64])
@pytest.mark.interpreted(channels=[7], queries=[1], query_batch=[3], dtype=[torch.float64])
@pytest.mark.interpreted(channels=[20], queries=[33], query_batch=[3], dtype=[torch.float32])
@both_dtypes
@pytest.mark.parametrize("query_batch", [1, 3], ids=["shared", "separate"])
@pytest.mark.parametrize("queries", [1, 17, 33])
@pytest.mark.parametrize("channels", [1, 4, 7, 20, 65])
def test_every_size(channels: int, queries: int, query_batch: int, dtype: torch.dtype, tolerance: float) -> None:
    """The C++ loop holds 16 queries, takes channels by fours, and shortens tiles of many channels."""
    inputs = random_inputs(5, 101, batch=3, query_batch=query_batch, heads=2, queries=queries, channels=channels)
    tolerance *= 2 if channels > 7 else 1  # sums of more terms
    check_against_formula(inputs, dtype, tolerance, random_mask(3, 5, 101))


@all_backends
@both_dtypes
def test_channels_that_fill_a_tile(dtype: torch.dtype, tolerance: float) -> None:
    check_against_formula(random_inputs(3, 37, channels=521), dtype, 4 * tolerance)  # sums of more terms


@all_backends
@pytest.mark.interpreted(value=[torch.nan], query_batch=[2], dtype=[torch.float32])
@pytest.mark.interpreted(value=[-torch.inf], query_batch=[1], dtype=[torch.float64])
@both_dtypes
@pytest.mark.parametrize("query_batch", [1, 2], ids=["shared", "separate"])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_masked_tokens_are_inert(value: float, query_batch: int, dtype: torch.dtype, tolerance: float) -> None:
    """One sample is masked fully, another in part: masked tokens are not read and get no gradient."""
    content_queries, axis_queries, content, scale = random_inputs(3, 5, 7, query_batch=query_batch)
    mask = random_mask(2, 3, 5, 7)
    mask[1] = False
    content, scale = content.masked_fill(~mask[:, None], value), scale.masked_fill(~mask, value)
    inputs = [content_queries, axis_queries, content, scale]
    check_against_formula(inputs, dtype, tolerance, mask)
    read, marginals, lse, *gradients = outputs_and_gradients(read_grid, inputs, mask)
    d_content_queries, d_axis_queries, d_content, d_scale = gradients
    assert not read[1].any() and not marginals[1].any() and (lse[1] == -torch.inf).all()
    assert not d_content[:, :, ~mask[0]][0].any() and not d_content[1].any() and not d_scale[~mask].any()
    assert query_batch == 1 or (not d_content_queries[1].any() and not d_axis_queries[1].any())


@all_backends
@pytest.mark.interpreted
@pytest.mark.parametrize("sign", [1, -1])
def test_one_token_with_a_score_of_ten_thousand(sign: int) -> None:
    """The scores are exactly 1e4, 9600 and -1e4 times the sign, far enough apart in float32 for one token to win."""
    content = torch.full((1, 1, 3, 523), 96.0)
    content[0, 0, 1, 509], content[0, 0, 2, 7] = 100.0, -100.0
    content_queries, axis_queries = torch.full((1, 1, 1, 1), 100.0 * sign), torch.zeros(1, 1, 1, 526)
    actual = outputs_and_gradients(read_grid, [content_queries, axis_queries, content, torch.ones(1, 3, 523)])
    assert all(x.isfinite().all() for x in actual)
    read, marginals, lse = (x.flatten() for x in actual[:3])
    torch.testing.assert_close(read, torch.tensor([100.0 * sign]), rtol=0.0, atol=0.0)
    torch.testing.assert_close(lse, torch.tensor([1e4]), rtol=2e-7, atol=0.0)
    row, column = (1, 509) if sign > 0 else (2, 7)
    assert marginals.nonzero().flatten().tolist() == [row, 3 + column]
    torch.testing.assert_close(marginals[marginals > 0], torch.ones(2), rtol=0.0, atol=0.0)


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4, 1e-4])
def test_scores_of_any_size_give_no_nan(size: float, dtype: torch.dtype) -> None:
    content_queries, axis_queries, *tokens = (x.to(dtype) for x in random_inputs(7, 263, queries=17))
    actual = outputs_and_gradients(read_grid, [size * content_queries, size * axis_queries, *tokens])
    assert all(x.isfinite().all() for x in actual)
    row_sums, column_sums = actual[1][..., :7].sum(-1), actual[1][..., 7:].sum(-1)
    torch.testing.assert_close(row_sums, column_sums)


@all_backends
@pytest.mark.interpreted(dtype=[torch.float32])
@both_dtypes
@pytest.mark.parametrize("slope", [1, -1], ids=["rising", "falling"])
def test_scores_that_rise_or_fall_over_the_grid(slope: int, dtype: torch.dtype, tolerance: float) -> None:
    """The sums are rescaled whenever a score exceeds all before it by much."""
    content_queries, axis_queries, content, scale = random_inputs(11, 37)
    axis_queries[..., :11] += slope * torch.linspace(-60, 60, 11, dtype=torch.float64)
    inputs = [content_queries, axis_queries, content, torch.ones_like(scale)]
    check_against_formula(inputs, dtype, tolerance * 20)


@all_backends
@pytest.mark.interpreted
def test_scales_of_zero_and_below() -> None:
    *others, scale = random_inputs(5, 17)
    scale[0], scale[1, 2] = -scale[0], 0.0
    check_against_formula([*others, scale], torch.float64, 1e-10)


@all_backends
@pytest.mark.interpreted(dtype=[torch.float64])
@both_dtypes
def test_inputs_that_are_not_contiguous(dtype: torch.dtype, tolerance: float) -> None:
    content_queries, axis_queries, content, scale = random_inputs(7, 11, heads=3)
    inputs = [
        content_queries.mT.contiguous().mT,
        torch.cat([axis_queries, axis_queries], dim=-1)[..., : axis_queries.shape[-1]],
        content.movedim(1, -1).contiguous().movedim(-1, 1),
        scale.mT.contiguous().mT,
    ]
    mask = random_mask(2, 11, 7).mT
    assert not any(x.is_contiguous() for x in (*inputs, mask))
    check_against_formula(inputs, dtype, tolerance, mask)
    expanded = [content[:1].expand(2, -1, -1, -1), scale[:1].expand(2, -1, -1)]
    check_against_formula([content_queries, axis_queries, *expanded], dtype, tolerance, mask)


@all_backends
@pytest.mark.interpreted
def test_autocast_does_not_narrow_the_sums() -> None:
    inputs = [x.float() for x in random_inputs(5, 7)]
    outside = outputs_and_gradients(read_grid, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = outputs_and_gradients(read_grid, inputs)
    torch.testing.assert_close(inside, outside, rtol=0.0, atol=0.0)


@all_backends
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")  # opcheck's, since PyTorch 2.14
@pytest.mark.interpreted(masked=[True])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_opcheck(masked: bool) -> None:
    inputs = random_inputs(5, 7)
    mask = random_mask(2, 5, 7) if masked else None
    torch.library.opcheck(operator._read_grid, (*(x.requires_grad_() for x in inputs), mask))
    inputs = [x.detach() for x in inputs]
    read, marginals, lse, base, total = operator._read_grid(*inputs, mask)
    for needs_token_gradients in (True, False):
        arguments = (*inputs, mask, base, total, read, marginals, lse, needs_token_gradients)
        torch.library.opcheck(operator._read_grid_backward, arguments)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("batch", [1, 3])
def test_results_are_the_same_bits_for_any_number_of_threads(batch: int) -> None:
    """Only the C++ loop promises this; PyTorch's matrix products do not."""
    inputs = [x.float() for x in random_inputs(13, 67, batch=batch, heads=2, queries=37)]
    mask = random_mask(batch, 13, 67)
    results = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        results.append(outputs_and_gradients(read_grid, inputs, mask))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0.0, atol=0.0)


@pytest.mark.refusal
class TestRefusals:
    """The C++ loop looks at memory, not at shapes, so nothing else may reach it, by any way of calling."""

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
        inputs = [torch.ones(size) for size in {**self.good, name: shape}.values()]
        with pytest.raises(ValueError, match="must"):
            call(*inputs, None)

    @pytest.mark.parametrize("name", list(good))
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
    def test_refused_dtypes(self, name, dtype):
        inputs = {
            key: torch.ones(size, dtype=dtype if key == name else torch.float32) for key, size in self.good.items()
        }
        with pytest.raises(TypeError, match="must be"):
            read_grid(*inputs.values())

    @pytest.mark.parametrize(
        "mask", [torch.ones(2, 11, 13), torch.ones(1, 1, 1, dtype=torch.bool)], ids=["dtype", "shape"]
    )
    def test_refused_masks(self, mask):
        inputs = [torch.ones(size) for size in self.good.values()]
        with pytest.raises((TypeError, ValueError), match="mask must"):
            read_grid(*inputs, mask)

    def test_devices_must_agree(self) -> None:
        content_queries, axis_queries, content, scale = random_inputs(3, 7)
        with pytest.raises(
            TypeError, match=r"axis_queries must be torch\.float64 on cpu, like content; got .* on meta"
        ):
            operator._validated(content_queries, axis_queries.to("meta"), content, scale, None)


def test_gradients_without_queries_are_zero():
    content, scale = torch.ones(2, 7, 11, 13, requires_grad=True), torch.ones(2, 11, 13, requires_grad=True)
    read = read_grid(torch.ones(2, 3, 0, 7), torch.ones(2, 3, 0, 24), content, scale)
    (read.content.sum() + read.marginals.sum() + read.lse.sum()).backward()
    assert content.grad.abs().max() == 0 and scale.grad.abs().max() == 0


def test_a_nan_with_any_payload_propagates():
    odd = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    content = torch.ones(1, 1, 2, 3)
    content[0, 0, 1, 2] = odd
    read = read_grid(torch.ones(1, 1, 5, 1), torch.zeros(1, 1, 5, 5), content, torch.ones(1, 2, 3))
    assert read.content.isnan().all() and read.lse.isnan().all()
