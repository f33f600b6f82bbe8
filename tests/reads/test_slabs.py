"""Reads of a large input slab by slab: exact, in memory that does not grow with the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perceiver_core import Tokens
from perceiver_core.reads import slabs
from perceiver_core.reads.factored_keys_values import AttendSlab, FactoredKeysValues, Norm, factor
from tests.memory import Kept, Largest
from tests.reads.factored_cases import (
    ATTEND_SLAB,
    EPS,
    GRID,
    TABLES,
    B,
    C,
    D,
    E,
    H,
    P,
    Q,
    attend,
    baseline,
    bools,
    check,
    draw,
    factored_memory,
    make,
)

each_form = pytest.mark.parametrize("attend_slab", ATTEND_SLAB.values(), ids=ATTEND_SLAB)


@pytest.fixture(params=[("TOKENS", 97), ("ENTRIES", 4 * H * Q), ("TOKENS", 1)], ids=["tokens", "entries", "one index"])
def in_slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, *request.param)


@pytest.mark.usefixtures("in_slabs")
@each_form
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("tables", ["none", "overlapping", "whole grid", "last two axes"])
def test_slabs_equal_one_pass(tables: str, masked: bool, attend_slab: AttendSlab) -> None:
    case, mask = make(TABLES[tables]), bools(B, *GRID) if masked else None
    assert len(slabs._slabs(case.q, factored_memory(case, "layer norm", mask))) > 3
    check(case, "layer norm", torch.float64, 1e-10, mask, attend_slab=attend_slab)
    with torch.no_grad():
        torch.testing.assert_close(
            tuple(attend(case, "layer norm", mask, attend_slab=attend_slab)),
            tuple(baseline(case, "layer norm", mask)),
            rtol=0.0,
            atol=1e-10,
        )


@pytest.mark.usefixtures("in_slabs")
def test_fully_masked_slabs() -> None:
    case, mask = make(), bools(B, *GRID)
    mask[:, :, 3:11], mask[0, :, 13:] = False, False
    check(case, "layer norm", torch.float64, 1e-10, mask)


def test_no_queries_give_an_empty_output() -> None:
    case = make()
    output, lse = attend(case._replace(q=case.q[:, :, :0]), "no norm")
    assert output.shape == (B, H, 0, E) and lse.shape == (B, H, 0)


def long_case(n: int, attend_slab: AttendSlab, tokens_per_slab: int) -> tuple[FactoredKeysValues, Tensor]:
    content = draw(B, n, C).requires_grad_()
    weights = [(draw(H * width, C + P, seed=width), None) for width in (D, E)]
    tokens, options = Tokens(content, (draw(n, P),)), {"attend_slab": attend_slab, "tokens_per_slab": tokens_per_slab}
    return factor(tokens, Norm(EPS), *weights, num_heads=H, **options), draw(B, H, Q, D).requires_grad_()


@each_form
def test_slabs_allocate_nothing_of_tokens_times_heads_times_width(attend_slab: AttendSlab) -> None:
    """Allocates only one slab at a time and the outputs of each."""
    n, count = 10_007, 101
    memory, q = long_case(n, attend_slab, B * n // count)
    size = B * n * H * D
    with Kept() as kept, Largest() as largest:
        part = memory.attend_with_lse(q)
        after_forward = kept.bytes
        (part.output.sum() + part.lse.sum()).backward()
    outputs = 4 * (count + 3) * 8 * B * H * Q * (E + 3)
    assert after_forward < outputs < 8 * size / 4
    assert largest.size <= max(B * n * C, 3 * size // count)


def test_keys_are_kept_without_slabs() -> None:
    """Shows that the measurement above detects them."""
    memory, q = long_case(10_007, ATTEND_SLAB["formed"], slabs.TOKENS)
    with Kept() as kept:
        part = memory.attend_with_lse(q)
        assert kept.bytes > 8 * B * 10_007 * H * (D + E)
    assert part.output.requires_grad


def test_slabs_cover_the_longest_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    memory = factored_memory(case, "no norm")
    assert slabs._slabs(case.q, memory) == [slabs.Slab(1, 0, 17)]
    cut = slabs._slabs(case.q, memory._replace(tokens_per_slab=B * 3 * 5 * 7))
    assert cut == [slabs.Slab(1, 0, 7), slabs.Slab(1, 7, 7), slabs.Slab(1, 14, 3)]
    monkeypatch.setattr(slabs, "ENTRIES", H * Q * 9)
    assert slabs._slabs(case.q, memory) == [slabs.Slab(1, 0, 9), slabs.Slab(1, 9, 8)]


def test_slabs_are_larger_on_a_gpu() -> None:
    assert slabs.factor_for(torch.device("cpu")) == 1
    assert slabs.factor_for(torch.device("cuda")) == slabs.GPU_FACTOR


@pytest.mark.refusal
def test_no_second_derivatives_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "TOKENS", 97)
    case = make().mapped(lambda x: x.requires_grad_())
    out = attend(case, "layer norm").output.square().sum()
    (slope,) = torch.autograd.grad(out, case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
