"""Factored keys and values against the formula on dense tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perceiver_core import masks
from perceiver_core.kernels import reference
from perceiver_core.reads.factored_keys_values import AttendSlab
from tests.reads.factored_cases import (
    ATTEND_SLAB,
    GRID,
    NORMS,
    TABLES,
    B,
    attend,
    baseline,
    bools,
    check,
    factored_memory,
    keys_values,
    make,
    results,
)

dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=["float64", "float32"]
)
each_form = pytest.mark.parametrize("attend_slab", ATTEND_SLAB.values(), ids=ATTEND_SLAB)


@each_form
@dtypes
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tables", TABLES)
def test_it_equals_attention_over_normalized_tokens(
    tables: str, norm: str, dtype: torch.dtype, tolerance: float, attend_slab: AttendSlab
) -> None:
    tolerance *= 2 if attend_slab is ATTEND_SLAB["formed"] else 1  # keys are rounded too
    check(make(TABLES[tables], norm), norm, dtype, tolerance, attend_slab=attend_slab)


@each_form
@dtypes
@pytest.mark.parametrize("query_batch", [1, B], ids=["shared", "own"])
@pytest.mark.parametrize("tables", ["none", "disjoint", "outer axes"])
def test_masks(tables: str, query_batch: int, dtype: torch.dtype, tolerance: float, attend_slab: AttendSlab) -> None:
    check(
        make(TABLES[tables], query_batch=query_batch),
        "layer norm",
        dtype,
        tolerance,
        bools(B, *GRID),
        attend_slab=attend_slab,
    )


@each_form
@pytest.mark.parametrize("held", [torch.nan, torch.inf])
def test_masked_tokens_have_no_effect(held: float, attend_slab: AttendSlab) -> None:
    """NaN under the mask has no effect, and fully masked samples give zeros."""
    case, mask = make(), bools(B, *GRID)
    mask[1] = False
    spoiled = case._replace(content=case.content.masked_fill(~mask[..., None], held))
    actual, expected = (results(attend, x, "layer norm", mask, attend_slab=attend_slab) for x in (spoiled, case))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)
    output, lse, d_q, d_content, *others = actual
    assert not output[1].any() and (lse[1] == -torch.inf).all() and not d_q[1].any()
    assert not d_content[~mask].any() and all(x.isfinite().all() for x in others)


@each_form
def test_the_key_bias_has_a_zero_gradient_from_the_output(attend_slab: AttendSlab) -> None:
    """Softmax is invariant to a shift of all scores, but optimizers need a gradient."""
    case = make().mapped(lambda x: x.requires_grad_())
    attend(case, "layer norm", attend_slab=attend_slab).output.square().sum().backward()
    bias, weight = case.key[1], case.key[0]
    assert bias is not None and bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.zeros_like(bias), rtol=0.0, atol=1e-12)
    assert weight.grad is not None and weight.grad.abs().max() > 1e-2


@each_form
def test_projections_without_biases(attend_slab: AttendSlab) -> None:
    check(make(bias=False), "plain layer norm", torch.float64, 1e-10, attend_slab=attend_slab)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tables", TABLES)
def test_formed_returns_keys_and_values_of_all_tokens(tables: str, norm: str) -> None:
    case, mask = make(TABLES[tables], norm), bools(B, *GRID)
    formed = factored_memory(case, norm, mask).form(torch.float64)
    for actual, expected in zip(formed[:2], keys_values(case, norm, mask), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)
    assert isinstance(formed.mask, masks.Padding) and torch.equal(formed.mask.keys, mask.flatten(1))
    assert factored_memory(case, norm).form(torch.float64).mask is None


@each_form
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_mask_besides_its_own_and_dropout_use_the_kernel(masked: bool, attend_slab: AttendSlab) -> None:
    case, mask = make(), bools(B, *GRID) if masked else None
    memory = factored_memory(case, "layer norm", mask, attend_slab)
    formed, calls = memory.form(torch.float64), []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, mask: masks.Mask | None, dropout: float = 0.0) -> Tensor:
        calls.append(dropout)
        return reference(q, k, v, mask=mask)

    expected = formed.attend(case.q, reference)
    torch.testing.assert_close(memory.attend(case.q, kernel), expected, rtol=0.0, atol=1e-10)
    assert calls == []
    torch.testing.assert_close(memory.attend(case.q, kernel, dropout=0.25), expected, rtol=0.0, atol=1e-10)
    causal = masks.Window(before=100, after=7)
    out = memory.attend(case.q, kernel, mask=causal)
    torch.testing.assert_close(out, formed.attend(case.q, reference, mask=causal), rtol=0.0, atol=1e-10)
    assert calls == [0.25, 0.0]


@each_form
def test_one_sample_for_several_batches_of_queries(attend_slab: AttendSlab) -> None:
    case, mask = make(), bools(1, *GRID)
    one = case._replace(content=case.content[:1])
    actual = attend(one, "layer norm", mask, attend_slab)
    each = case._replace(content=one.content.expand(B, -1, -1, -1, -1))
    expected = attend(each, "layer norm", mask.expand(B, -1, -1, -1), attend_slab)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0.0, atol=1e-12)


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


@each_form
@pytest.mark.parametrize("tables", ["none", "disjoint"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_content_far_from_zero_is_as_accurate_as_with_layer_norm(
    offset: float, tables: str, attend_slab: AttendSlab
) -> None:
    case = make(TABLES[tables])
    case = case._replace(content=case.content + offset).mapped(Tensor.float)
    truth = baseline(case.mapped(Tensor.double), "layer norm").output
    ours, torchs = attend(case, "layer norm", attend_slab=attend_slab).output, baseline(case, "layer norm").output
    assert error(ours, truth) < 4 * error(torchs, truth) + 1e-6


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer norm", "RMS norm", "no norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_half_precision_is_as_accurate_as_with_dense_tokens(
    masked: bool, norm: str, dtype: torch.dtype, attend_slab: AttendSlab
) -> None:
    case, mask = make(norm=norm).mapped(lambda x: x.to(dtype)), bools(B, *GRID) if masked else None
    truth = results(baseline, case.mapped(Tensor.double), norm, mask)
    ours, torchs = results(attend, case, norm, mask, attend_slab=attend_slab), results(baseline, case, norm, mask)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for actual, other, expected in zip(ours, torchs, truth, strict=True):
        if expected.abs().max() > 1e-9:  # the bias of the key has no gradient
            assert error(actual, expected) <= 1.1 * error(other, expected) + torch.finfo(dtype).eps
