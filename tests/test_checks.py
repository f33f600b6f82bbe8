"""Checks accept valid inputs and raise helpful errors for all others."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_core import checks

pytestmark = pytest.mark.no_shape_checks


def says(error: type[Exception], message: str):  # type: ignore[no-untyped-def]
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_floating_accepts_every_floating_dtype(dtype: torch.dtype) -> None:
    checks.is_floating("x", torch.zeros(3, dtype=dtype))


def test_is_floating_raises_for_other_inputs() -> None:
    with says(TypeError, "image must be a torch.Tensor; got list. Convert it: torch.as_tensor(...)"):
        checks.is_floating("image", [1.0])  # type: ignore[arg-type]
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        hint = "Convert and scale it, 8-bit images for example: image.float() / 255"
        with says(TypeError, f"image must be floating point; got {dtype}. {hint}"):
            checks.is_floating("image", torch.zeros(3, dtype=dtype))


def test_has_shape() -> None:
    checks.has_shape("x", torch.zeros(2, 3, 5), "b n c")
    checks.has_shape("x", torch.zeros(2, 3, 5), "b n c", last=5)
    with says(ValueError, "x must have 3 axes (b n c); got shape (3, 5); add a batch axis: x.unsqueeze(0)"):
        checks.has_shape("x", torch.zeros(3, 5), "b n c")
    with says(ValueError, "x must have 3 axes (b n c); got shape (5,)"):
        checks.has_shape("x", torch.zeros(5), "b n c")
    with says(ValueError, "x must have 3 axes (b n c); got shape (2, 3, 5, 7)"):
        checks.has_shape("x", torch.zeros(2, 3, 5, 7), "b n c")
    checks.has_shape("x", torch.zeros(0, 3, 5), "b n c")
    with says(ValueError, "x must not be empty; got shape (2, 0, 5)"):
        checks.has_shape("x", torch.zeros(2, 0, 5), "b n c")
    with says(ValueError, "x must not be empty; got shape (0, 5)"):
        checks.has_shape("x", torch.zeros(0, 5), "rows columns")
    with says(ValueError, "x must have 7 features in its last axis (b n c); got shape (2, 3, 5)"):
        checks.has_shape("x", torch.zeros(2, 3, 5), "b n c", last=7)


def test_not_empty() -> None:
    checks.not_empty("x", torch.zeros(()))
    checks.not_empty("x", torch.zeros(1, 2))
    checks.not_empty("x", torch.zeros(0, 2))
    with says(ValueError, "x must not be empty; got shape (3, 0)"):
        checks.not_empty("x", torch.zeros(3, 0))


def test_has_channels() -> None:
    checks.has_channels("image", torch.zeros(2, 3, 5, 7), 1, 3)
    hint = "Build the adapter with num_channels=7, or move the channel axis"
    with says(ValueError, f"image must have 3 channels in axis 1; got 7 (shape (2, 7, 5, 3)). {hint}"):
        checks.has_channels("image", torch.zeros(2, 7, 5, 3), 1, 3)


def test_is_mask() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    checks.is_mask("mask", mask)
    checks.is_mask("mask", mask, (2, 3))
    checks.is_mask("mask", mask, torch.zeros(2, 3).shape)
    for shape in ((2, 3, 1), (3, 2), (1, 3), ()):
        with says(ValueError, f"mask must have shape {shape}, one value a token; got (2, 3)"):
            checks.is_mask("mask", mask, shape)
    for dtype in (torch.float32, torch.uint8, torch.int64):
        hint = "Convert it: mask.bool()"
        with says(TypeError, f"mask must be a boolean tensor, True = attend; got {dtype}. {hint}"):
            checks.is_mask("mask", mask.to(dtype), (2, 3))
    with says(TypeError, "keys must be a boolean tensor, True = attend; got list. Convert it: keys.bool()"):
        checks.is_mask("keys", [True])  # type: ignore[arg-type]


BAD = "x holds NaN or infinite values; clean it, or mask those tokens"


@pytest.mark.refusal
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite_raise_unless_masked(value: float, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, 5, 7, dtype=dtype)
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    checks.values("x", x)
    checks.values("x", x, mask)
    x[1, 2, 3, 4] = value
    with says(ValueError, BAD):
        checks.values("x", x)
    with says(ValueError, BAD):
        checks.values("x", x, mask)
    mask[1, 2, 3] = False
    checks.values("x", x, mask)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    with says(ValueError, BAD):
        checks.values("x", torch.tensor([[[math.inf], [-math.inf]]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_an_overflowing_sum_is_not_an_infinite_value(dtype: torch.dtype) -> None:
    x = torch.full((2, 3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert x.sum().isinf()
    checks.values("x", x)
    checks.values("x", x, torch.ones(2, 3, dtype=torch.bool))


def test_samples_without_a_token_are_named() -> None:
    mask = torch.ones(5, 3, 7, dtype=torch.bool)
    mask[1] = mask[4] = False
    message = "mask leaves no token to attend to in samples [1, 4]; drop them or unmask a token"
    with says(ValueError, message):
        checks.values("x", torch.ones(5, 3, 7, 2), mask)
    with says(ValueError, message):  # the more useful of the two messages
        checks.values("x", torch.full((5, 3, 7, 2), math.nan), mask)
    first_ten = re.escape(str(list(range(10))))
    with pytest.raises(ValueError, match=f"in samples {first_ten};"):
        checks.values("x", torch.ones(13, 3, 2), torch.zeros(13, 3, dtype=torch.bool))


@pytest.mark.compile
def test_values_are_not_checked_under_compile() -> None:
    def checked(x: Tensor, mask: Tensor) -> Tensor:
        checks.values("x", x, mask)
        return x + 1

    whole = torch.compile(checked, backend="eager", fullgraph=True)
    assert whole(torch.full((2, 3, 5), math.nan), torch.zeros(2, 3, dtype=torch.bool)).isnan().all()


def test_values_are_not_checked_without_data() -> None:
    bad, mask = torch.full((2, 3, 5), math.nan), torch.zeros(2, 3, dtype=torch.bool)

    def checked(x: Tensor, mask: Tensor | None) -> Tensor:
        checks.values("x", x, mask)
        return x + 1

    assert torch.vmap(checked, (0, None))(bad[:, None], None).shape == (2, 1, 3, 5)
    assert torch.vmap(checked)(bad[:, None], mask[:, None]).shape == (2, 1, 3, 5)
    assert checked(bad.to("meta"), mask.to("meta")).shape == (2, 3, 5)
    with FakeTensorMode() as fake:
        assert checked(fake.from_tensor(bad), fake.from_tensor(mask)).shape == (2, 3, 5)
        assert checked(fake.from_tensor(bad), None).shape == (2, 3, 5)


def test_values_are_checked_under_grad() -> None:
    def loss(x: Tensor) -> Tensor:
        checks.values("x", x)
        return x.square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.ones(2, 3, 5)), torch.full((2, 3, 5), 2.0))
    with says(ValueError, BAD):
        torch.func.grad(loss)(torch.full((2, 3, 5), math.nan))


def test_matches_weight() -> None:
    weight = torch.zeros(3)
    checks.matches_weight("tokens", torch.zeros(2), weight)
    with says(ValueError, "tokens is on meta, the model on cpu; move one: tokens.to('cpu')"):
        checks.matches_weight("tokens", torch.zeros(2, device="meta"), weight)
    hint = "convert one (tokens.to(torch.float32)), or use torch.autocast"
    with says(TypeError, f"tokens is torch.bfloat16, the model torch.float32; {hint}"):
        checks.matches_weight("tokens", torch.zeros(2).bfloat16(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checks.matches_weight("tokens", torch.zeros(2).bfloat16(), weight)
        with pytest.raises(ValueError, match="tokens is on meta"):
            checks.matches_weight("tokens", torch.zeros(2, device="meta"), weight)


@pytest.mark.parametrize("size", [0, -3, 1.0, True, "3", None], ids=repr)
def test_positive(size: object) -> None:
    checks.positive(dim=1, heads=10**9)
    with says(ValueError, f"dim must be a whole number of at least 1; got {size!r}"):
        checks.positive(heads=3, dim=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_probability(rate: float) -> None:
    checks.probability(dropout=0.0, residual=0.999)
    with says(ValueError, f"dropout must lie in [0, 1); got {rate!r}"):
        checks.probability(residual=0.5, dropout=rate)
