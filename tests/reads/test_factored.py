"""Factored keys and values against the formula on dense tokens, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import CrossAttend, Tokens, masks, reads
from perceiver_core.kernels import reference
from perceiver_core.kernels.chunked import PartialAttention
from perceiver_core.reads import factored
from perceiver_core.reads.factored import FactoredKeysValues, Norm, attend, axes_of, factor
from tests.memory import Kept, Largest

B, H, Q, C, P = 2, 3, 5, 7, 11  # batch, heads, queries, channels, width of positions
D, E = 13, 2  # of a head's keys and values
GRID = (3, 17, 5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def columns(start: int, stop: int, *shape: int, seed: int) -> Tensor:
    """A table with some nonzero columns."""
    table = torch.zeros(*shape, P, dtype=torch.float64)
    table[..., start:stop] = draw(*shape, stop - start, seed=seed)
    return table


TABLES = {
    "none": (),
    "one axis": (draw(1, 17, 1, P, seed=1),),
    "disjoint": (
        columns(0, 5, 3, 1, 1, seed=1),
        columns(5, 8, 1, 17, 1, seed=2),
        columns(8, 11, 1, 1, 5, seed=3),
    ),
    "overlapping": (draw(3, 1, 1, P, seed=1), columns(2, 9, 1, 17, 1, seed=2), draw(1, 1, 5, P, seed=3)),
    "whole grid": (draw(3, 17, 5, P, seed=1),),
    "two on an axis": (draw(1, 17, 1, P, seed=1), draw(1, 17, 1, P, seed=2), draw(1, 1, 5, P, seed=3)),
    "first two axes": (draw(3, 17, 1, P, seed=1), draw(1, 1, 5, P, seed=2)),
    "last two axes": (draw(3, 1, 1, P, seed=1), draw(1, 17, 5, P, seed=2)),
    "outer axes": (draw(3, 1, 5, P, seed=1), draw(1, 17, 1, P, seed=2)),
    "overlapping spans": (draw(3, 17, 1, P, seed=1), draw(1, 17, 5, P, seed=2)),
    "constant": (draw(1, 1, 1, P, seed=1), draw(1, 17, 1, P, seed=2)),
    "constant alone": (draw(1, 1, 1, P, seed=1),),
}


class Case(NamedTuple):
    """Inputs of a read; `leaves` lists all differentiable ones in order."""

    q: Tensor
    content: Tensor
    tables: tuple[Tensor, ...]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    weight: Tensor | None = None  # of the norm
    bias: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        flat = [self.q, self.content, *self.tables, *self.key, *self.value, self.weight, self.bias]
        return [x for x in flat if x is not None]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Case:
        return Case(*torch.utils._pytree.tree_map_only(Tensor, function, tuple(self)))


NORMS = {
    "layer norm": ("layer", True, True),
    "layer norm without bias": ("layer", True, False),
    "plain layer norm": ("layer", False, False),
    "RMS norm": ("rms", True, False),
    "plain RMS norm": ("rms", False, False),
    "no norm": (None, False, False),
}


def make(
    tables: tuple[Tensor, ...] = TABLES["disjoint"], norm: str = "layer norm", asking: int = B, bias: bool = True
) -> Case:
    width = C + (P if tables else 0)
    _, weight, shift = NORMS[norm]
    return Case(
        q=draw(asking, H, Q, D, seed=20),
        content=draw(B, *GRID, C, seed=21),
        tables=tables,
        key=(draw(H * D, width, seed=22) / width**0.5, draw(H * D, seed=23) if bias else None),
        value=(draw(H * E, width, seed=24), draw(H * E, seed=25) if bias else None),
        weight=1 + 0.3 * draw(width, seed=26) if weight else None,
        bias=draw(width, seed=27) if shift else None,
    )


EPS = 0.013


def structured(case: Case, norm: str, mask: Tensor | None = None, **how: bool) -> PartialAttention:
    kind, _, _ = NORMS[norm]
    normed = None if kind is None else Norm(EPS, case.weight, case.bias, center=kind == "layer")
    read = factor(Tokens(case.content, case.tables, mask), normed, case.key, case.value, heads=H)
    return attend(case.q, read._replace(**how))


def keys_values(case: Case, norm: str, mask: Tensor | None = None) -> list[Tensor]:
    x = Tokens(case.content, case.tables, mask).materialize()
    if NORMS[norm][0] == "layer":
        x = F.layer_norm(x, x.shape[-1:], case.weight, case.bias, EPS)
    elif NORMS[norm][0] == "rms":
        x = F.rms_norm(x, x.shape[-1:], case.weight, EPS)
    return [F.linear(x, *part).unflatten(-1, (H, -1)).transpose(1, 2) for part in (case.key, case.value)]


def ordinary(case: Case, norm: str, mask: Tensor | None = None) -> PartialAttention:
    """Baseline: tokens are materialized, normalized, projected and read."""
    keys, values = keys_values(case, norm, mask)
    q = case.q.expand(B, -1, -1, -1)
    scores = q @ keys.mT / D**0.5
    if mask is None:
        return PartialAttention(reference(q, keys, values), scores.logsumexp(-1))
    present = mask.flatten(1)
    lse = scores.masked_fill(~present[:, None, None], -torch.inf).logsumexp(-1)
    return PartialAttention(reference(q, keys, values, mask=masks.Padding(present)), lse)


def results(read: Callable[..., PartialAttention], case: Case, *args: Any, **how: Any) -> list[Tensor]:
    """Returns output, log-sum-exp and all gradients, for random gradients of both."""
    case = case.mapped(lambda x: x.detach().requires_grad_())
    outputs = read(case, *args, **how)
    given = [draw(*x.shape, seed=30 + i).to(x.dtype) for i, x in enumerate(outputs)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, case.leaves(), given)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compares with a tolerance relative to the largest value of each tensor, or to their common scale."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        largest = max(e.abs().max().item(), 1.0)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=0.0, atol=tolerance * largest, msg=lambda m, i=i: f"result {i}: {m}"
        )


def check(case: Case, norm: str, dtype: torch.dtype, tolerance: float, mask: Tensor | None = None, **how: bool) -> None:
    case = case.mapped(lambda x: x.to(dtype))
    expected = results(ordinary, case.mapped(Tensor.double), norm, mask)
    agree(results(structured, case, norm, mask, **how), expected, tolerance)


dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=["float64", "float32"]
)
ways = pytest.mark.parametrize("form", [False, True], ids=["structured", "formed"])


@ways
@dtypes
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tables", TABLES)
def test_it_equals_attention_over_normalized_tokens(
    tables: str, norm: str, dtype: torch.dtype, tolerance: float, form: bool
) -> None:
    check(make(TABLES[tables], norm), norm, dtype, (2 if form else 1) * tolerance, form=form)  # keys are rounded too


@ways
@dtypes
@pytest.mark.parametrize("asking", [1, B], ids=["shared", "own"])
@pytest.mark.parametrize("tables", ["none", "disjoint", "outer axes"])
def test_masks(tables: str, asking: int, dtype: torch.dtype, tolerance: float, form: bool) -> None:
    check(make(TABLES[tables], asking=asking), "layer norm", dtype, tolerance, bools(B, *GRID), form=form)


@ways
@pytest.mark.parametrize("held", [torch.nan, torch.inf])
def test_masked_tokens_have_no_effect(held: float, form: bool) -> None:
    """NaN under the mask has no effect, and fully masked samples give zeros."""
    case, mask = make(), bools(B, *GRID)
    mask[1] = False
    spoiled = case._replace(content=case.content.masked_fill(~mask[..., None], held))
    found, wanted = (results(structured, x, "layer norm", mask, form=form) for x in (spoiled, case))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)
    output, lse, d_q, d_content, *others = found
    assert not output[1].any() and (lse[1] == -torch.inf).all() and not d_q[1].any()
    assert not d_content[~mask].any() and all(x.isfinite().all() for x in others)


@ways
def test_the_key_bias_has_a_zero_gradient_from_the_output(form: bool) -> None:
    """Softmax is invariant to a shift of all scores, but optimizers need a gradient."""
    case = make().mapped(lambda x: x.requires_grad_())
    structured(case, "layer norm", form=form).output.square().sum().backward()
    bias, weight = case.key[1], case.key[0]
    assert bias is not None and bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.zeros_like(bias), rtol=0.0, atol=1e-12)
    assert weight.grad is not None and weight.grad.abs().max() > 1e-2


@ways
def test_projections_without_biases(form: bool) -> None:
    check(make(bias=False), "plain layer norm", torch.float64, 1e-10, form=form)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tables", TABLES)
def test_formed_returns_keys_and_values_of_all_tokens(tables: str, norm: str) -> None:
    case, mask = make(TABLES[tables], norm), bools(B, *GRID)
    normed = Norm(EPS, case.weight, case.bias, NORMS[norm][0] == "layer") if NORMS[norm][0] else None
    tokens = Tokens(case.content, case.tables, mask)
    formed = factor(tokens, normed, case.key, case.value, heads=H).formed(torch.float64)
    for found, wanted in zip(formed, keys_values(case, norm, mask), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-12)


def test_axes_spanned_by_a_table_are_merged() -> None:
    found = {name: axes_of(Tokens(draw(B, *GRID, C), tables)) for name, tables in TABLES.items()}
    assert found == {
        **dict.fromkeys(TABLES, GRID),
        "whole grid": (255,),
        "first two axes": (51, 5),
        "last two axes": (3, 85),
        "outer axes": (255,),
        "overlapping spans": (255,),
    }


MODULES = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm, eps": lambda width: nn.LayerNorm(width, eps=0.3),
    "LayerNorm, no bias": lambda width: nn.LayerNorm(width, bias=False),
    "LayerNorm, nothing learned": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "RMSNorm": nn.RMSNorm,
    "RMSNorm, eps": lambda width: nn.RMSNorm(width, eps=0.3),
    "RMSNorm, nothing learned": lambda width: nn.RMSNorm(width, eps=0.3, elementwise_affine=False),
    "RMSNorm, neither": lambda width: nn.RMSNorm(width, elementwise_affine=False),
    "Identity": lambda width: nn.Identity(),
}


@pytest.mark.parametrize("path", [reads.Structured(), reads.Factored()], ids=["Structured", "Factored"])
@pytest.mark.parametrize("norm", MODULES.values(), ids=MODULES.keys())
def test_modules_of_norms(norm: Callable[[int], nn.Module], path: reads.Strategy) -> None:
    """With any norm, a cross-attend gives the outputs and gradients of dense tokens."""
    torch.manual_seed(0)
    block = CrossAttend(14, C + P, num_heads=H, norm=norm).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    content, tables = (1e-3 * draw(B, *GRID, C)).requires_grad_(), [1e-3 * x for x in TABLES["overlapping"]]

    def found(path: reads.Strategy) -> list[Tensor]:
        reads.set_strategy(block, path)
        out = block(draw(B, Q, 14), Tokens(content, tuple(tables)))
        return [out, *torch.autograd.grad(out.square().sum(), [content, *block.parameters()])]

    torch.testing.assert_close(found(path), found(reads.Dense()), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("path", [reads.Structured(), reads.Factored()], ids=["Structured", "Factored"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_eps_that_rms_norm_has_by_default_in_half_precision(dtype: torch.dtype, path: reads.Strategy) -> None:
    """The content is so small that eps matters: the eps of the half-precision dtype would scale it down."""
    torch.manual_seed(0)
    block = CrossAttend(14, C, num_heads=1, norm=nn.RMSNorm, residual=False).to(dtype)
    x, tokens = draw(B, Q, 14).to(dtype), Tokens(1e-2 * draw(B, *GRID, C).to(dtype))
    found, wanted = (_read(block, x, tokens, way) for way in (path, reads.Dense()))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.05 * wanted.abs().max().item())


def _read(block: CrossAttend, x: Tensor, tokens: Tokens, path: reads.Strategy) -> Tensor:
    reads.set_strategy(block, path)
    return block.attention(block.query_norm(x), block.keys_values(tokens))


# Slabs


@pytest.fixture(params=[("SLAB", 97), ("ENTRIES", 4 * H * Q), ("SLAB", 1)], ids=["slabs", "entries", "one place"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, *request.param)


@pytest.mark.usefixtures("cut")
@ways
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("tables", ["none", "overlapping", "whole grid", "last two axes"])
def test_slabs_equal_one_pass(tables: str, masked: bool, form: bool) -> None:
    case, mask = make(TABLES[tables]), bools(B, *GRID) if masked else None
    read = factor(Tokens(case.content, case.tables), None, case.key, case.value, heads=H)
    assert len(factored._cuts(case.q, read)) > 3
    check(case, "layer norm", torch.float64, 1e-10, mask, form=form)
    with torch.no_grad():
        torch.testing.assert_close(
            tuple(structured(case, "layer norm", mask, form=form)),
            tuple(ordinary(case, "layer norm", mask)),
            rtol=0.0,
            atol=1e-10,
        )


@pytest.mark.usefixtures("cut")
def test_fully_masked_slabs() -> None:
    case, mask = make(), bools(B, *GRID)
    mask[:, :, 3:11], mask[0, :, 13:] = False, False
    check(case, "layer norm", torch.float64, 1e-10, mask)


def test_no_queries_give_an_empty_output() -> None:
    case = make()
    read = factor(Tokens(case.content, case.tables), None, case.key, case.value, heads=H)
    output, lse = attend(case.q[:, :, :0], read)
    assert output.shape == (B, H, 0, E) and lse.shape == (B, H, 0)


def long_case(n: int) -> tuple[FactoredKeysValues, Tensor]:
    content = draw(B, n, C).requires_grad_()
    weights = [(draw(H * width, C + P, seed=width), None) for width in (D, E)]
    return factor(Tokens(content, (draw(n, P),)), Norm(EPS), *weights, heads=H), draw(B, H, Q, D).requires_grad_()


@ways
def test_slabs_allocate_nothing_of_tokens_times_heads_times_width(form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocates only one slab at a time and the outputs of each."""
    n = 10_007
    read, q = long_case(n)
    slabs, size = 101, B * n * H * D
    monkeypatch.setattr(factored, "SLAB", B * n // slabs)
    with Kept() as kept, Largest() as largest:
        part = attend(q, read._replace(form=form))
        after_forward = kept.bytes
        (part.output.sum() + part.lse.sum()).backward()
    outputs = 4 * (slabs + 3) * 8 * B * H * Q * (E + 3)
    assert after_forward < outputs < 8 * size / 4
    assert largest.size <= max(B * n * C, 3 * size // slabs)


def test_keys_are_kept_without_slabs() -> None:
    """Shows that the measurement above detects them."""
    read, q = long_case(10_007)
    with Kept() as kept:
        part = attend(q, read._replace(form=True))
        assert kept.bytes > 8 * B * 10_007 * H * (D + E)
    assert part.output.requires_grad


# Precision


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


@ways
@pytest.mark.parametrize("tables", ["none", "disjoint"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_content_far_from_zero_is_as_accurate_as_with_layer_norm(offset: float, tables: str, form: bool) -> None:
    case = make(TABLES[tables])
    case = case._replace(content=case.content + offset).mapped(Tensor.float)
    truth = ordinary(case.mapped(Tensor.double), "layer norm").output
    ours, torchs = structured(case, "layer norm", form=form).output, ordinary(case, "layer norm").output
    assert error(ours, truth) < 4 * error(torchs, truth) + 1e-6


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer norm", "RMS norm", "no norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_half_precision_is_as_accurate_as_with_dense_tokens(
    masked: bool, norm: str, dtype: torch.dtype, form: bool
) -> None:
    case, mask = make(norm=norm).mapped(lambda x: x.to(dtype)), bools(B, *GRID) if masked else None
    truth = results(ordinary, case.mapped(Tensor.double), norm, mask)
    ours, torchs = results(structured, case, norm, mask, form=form), results(ordinary, case, norm, mask)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for found, other, wanted in zip(ours, torchs, truth, strict=True):
        if wanted.abs().max() > 1e-9:  # the bias of the key has no gradient
            assert error(found, wanted) <= 1.1 * error(other, wanted) + torch.finfo(dtype).eps
