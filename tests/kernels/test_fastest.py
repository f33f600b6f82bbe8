"""The default kernel: which kernel it selects, and the accuracy of bfloat16 products."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from perceiver_core import masks
from perceiver_core.kernels import chunked, fastest, reference, sdpa
from perceiver_core.masks import Mask

module: Any = sys.modules["perceiver_core.kernels.fastest"]  # whose name is that of the function

B, H, Q, K, D, E = 2, 3, 37, 1279, 29, 31  # keys beyond one chunk


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(dtype: torch.dtype, spread: float = 1.0) -> list[Tensor]:
    """Returns q, k and v whose scores have the standard deviation `spread`."""
    q, k, v = draw(B, H, Q, D), draw(B, H, K, D, seed=1), draw(B, H, K, E, seed=2)
    return [x.to(dtype) for x in (spread * q, k, v)]


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def dead(mask: Tensor) -> Tensor:
    """Returns the mask with one query fully masked."""
    mask[1, :, 5] = False
    return mask


MASKS: dict[str, Mask | None] = {
    "none": None,
    "padding": masks.Padding(bools(B, K)),
    "causal": masks.Causal(),
    "tensor": dead(bools(B, 1, Q, K)),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
halves = partial(chunked, chunk_size=module.CHUNK_SIZE, half_precision_matmul=True)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were called, in order."""
    names: list[str] = []
    for kernel in (sdpa, chunked):

        def spy(*args: Any, kernel: Any = kernel, **options: Any) -> Tensor:
            names.append(kernel.__name__)
            return kernel(*args, **options)

        monkeypatch.setattr(module, kernel.__name__, spy)
    return names


@pytest.fixture
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Parametrizes over processors with and without bfloat16 units."""
    present: bool = getattr(request, "param", True)
    monkeypatch.setattr(module, "has_bfloat16_units", lambda: present)
    monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", B * H * Q * K * D)
    return present


def test_small_inputs_use_sdpa(units: bool, taken: list[str]) -> None:
    q, k, v = qkv(torch.bfloat16)
    fastest(q, k, v)
    fastest(q[:, :, 1:], k, v)
    assert taken == ["chunked", "sdpa"]


either = pytest.mark.parametrize("units", [True, False], indirect=True, ids=["units", "no units"])


@either
@every_mask
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_dtypes_other_than_bfloat16_use_sdpa(
    dtype: torch.dtype, mask: Mask | None, units: bool, taken: list[str]
) -> None:
    inputs = qkv(dtype)
    equal(fastest(*inputs, mask=mask), sdpa(*inputs, mask=mask))
    assert taken == ["sdpa"]


@either
@every_mask
def test_bfloat16_uses_chunked_on_processors_with_bfloat16_units(
    mask: Mask | None, units: bool, taken: list[str]
) -> None:
    inputs = qkv(torch.bfloat16)
    equal(fastest(*inputs, mask=mask), (halves if units else sdpa)(*inputs, mask=mask))
    assert taken == ["chunked" if units else "sdpa"]
    assert module.uses_chunks(inputs[0], K) == units


@every_mask
@pytest.mark.parametrize(
    "dtype, kernel", [(torch.float64, "sdpa"), (torch.float32, "chunked"), (torch.float16, "chunked")], ids=str
)
def test_long_inputs_use_chunked(
    dtype: torch.dtype, kernel: str, mask: Mask | None, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's fused kernel adds the blocks of keys one after the other, and so their rounding errors."""
    inputs = qkv(dtype)
    monkeypatch.setattr(module, "LONG", K - 1)
    monkeypatch.setattr(module, "LONG_CHUNK_SIZE", 5)
    found = fastest(*inputs, mask=mask)
    assert taken == [kernel]
    torch.testing.assert_close(found, sdpa(*inputs, mask=mask), rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(module, "LONG", K)
    fastest(*inputs, mask=mask)
    assert taken == [kernel, "sdpa"]


@pytest.mark.usefixtures("units")
def test_dropout_uses_sdpa(taken: list[str]) -> None:
    inputs = qkv(torch.bfloat16)
    found = []
    for kernel in (fastest, sdpa):
        torch.manual_seed(0)
        found.append(kernel(*inputs, dropout=0.5))
    equal(*found)
    assert taken == ["sdpa"] and not module.uses_chunks(inputs[0], K, dropout=0.5)
    assert (found[0] - sdpa(*inputs)).abs().max() > 1e-2  # which applies dropout


@either
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_autocast_decides(
    autocast: torch.dtype, given: torch.dtype, units: bool, taken: list[str]
) -> None:
    """Float64 is left alone by autocast."""
    inputs = qkv(given)
    with torch.autocast("cpu", dtype=autocast):
        found, plain = fastest(*inputs), sdpa(*inputs)
    products = units and autocast == torch.bfloat16 and given != torch.float64
    assert taken == ["chunked" if products else "sdpa"]
    assert found.dtype == plain.dtype
    equal(found, halves(*(x.to(torch.bfloat16) for x in inputs)) if products else plain)


@pytest.mark.usefixtures("units")
def test_gradients_under_autocast_come_in_the_dtype_of_the_inputs() -> None:
    leaves = [x.requires_grad_() for x in qkv(torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastest(*leaves)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert [x.dtype for x in gradients] == [torch.float32] * 3


def with_gradients(kernel: Any, inputs: list[Tensor], mask: Mask | None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = kernel(*leaves, mask=mask)
    given = draw(*out.shape, seed=3).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, given)]


@pytest.mark.usefixtures("units")
@every_mask
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_products_in_bfloat16_are_close_to_the_formula(spread: float, mask: Mask | None) -> None:
    """Norms of errors relative to norms, against float64 on the same inputs."""
    inputs = qkv(torch.bfloat16, spread)
    found = with_gradients(fastest, inputs, mask)
    truth = with_gradients(reference, [x.double() for x in inputs], mask)
    for name, actual, expected, bound in zip(
        ("out", "dq", "dk", "dv"), found, truth, (2e-2, 3e-2, 3e-2, 3e-2), strict=True
    ):
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - expected).norm() < bound * expected.norm(), name


@pytest.mark.usefixtures("units")
def test_fully_masked_queries_give_zeros_and_no_gradient() -> None:
    out, d_q, d_k, d_v = with_gradients(fastest, qkv(torch.bfloat16), MASKS["tensor"])
    assert not out[1, :, 5].any() and not d_q[1, :, 5].any()
    assert all(x.isfinite().all() for x in (out, d_q, d_k, d_v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_mask
def test_half_products_of_float32_inputs_are_float32(mask: Mask | None, dtype: torch.dtype) -> None:
    inputs = qkv(dtype)
    for actual, expected in zip(
        with_gradients(partial(chunked, half_precision_matmul=True), inputs, mask),
        with_gradients(chunked, inputs, mask),
        strict=True,
    ):
        equal(actual, expected)


def test_half_products_change_the_result() -> None:
    inputs = qkv(torch.bfloat16, 4.0)
    assert not torch.equal(chunked(*inputs, half_precision_matmul=True), chunked(*inputs))
