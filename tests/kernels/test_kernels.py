"""Every kernel against the formula in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_core import masks
from perceiver_core.kernels import attention_map, chunked, reference, sdpa
from perceiver_core.masks import Mask
from tests.kernels.cases import (
    DEAD_ROW,
    MASKS,
    PAD,
    B,
    D,
    E,
    H,
    K,
    Kernel,
    Q,
    agree,
    bools,
    check,
    draw,
    exact,
    kernels,
    qkv,
    with_gradients,
)


def broadcastable_shapes() -> Iterator[tuple[int, ...]]:
    full = (B, H, Q, K)
    for axes in range(5):
        yield from product(*((1, size) for size in full[4 - axes :]))


@kernels
@pytest.mark.parametrize(("mask", "allowed"), MASKS.values(), ids=MASKS.keys())
def test_every_kernel_equals_the_formula_under_every_mask(
    kernel: Kernel, mask: Mask | None, allowed: Tensor | None
) -> None:
    check(kernel, qkv(), mask, allowed, 1e-10)


@kernels
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_values_that_are_not_floating_point_are_refused(kernel: Kernel, name: str, dtype: torch.dtype) -> None:
    inputs = dict(zip("qkv", qkv(e=D), strict=True))
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        kernel(**{**inputs, name: inputs[name].to(dtype)})


@kernels
@pytest.mark.parametrize("shape", list(broadcastable_shapes()), ids=str)
def test_a_tensor_mask_broadcasts_from_any_shape(kernel: Kernel, shape: tuple[int, ...]) -> None:
    mask = bools(*shape, seed=sum(shape))
    check(kernel, qkv(), mask, mask, 1e-10)


@kernels
@pytest.mark.parametrize(("mask", "allowed"), MASKS.values(), ids=MASKS.keys())
def test_float32(kernel: Kernel, mask: Mask | None, allowed: Tensor | None) -> None:
    check(kernel, [x.float() for x in qkv()], mask, allowed, 2e-6)


@kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("name", ["none", "causal", "and"])
def test_half_precision(kernel: Kernel, dtype: torch.dtype, tolerance: float, name: str) -> None:
    inputs = [x.to(dtype) for x in qkv()]
    assert kernel(*inputs).dtype == dtype
    check(kernel, inputs, *MASKS[name], tolerance)


@kernels
@pytest.mark.parametrize(
    "sizes",
    [
        {"q": 1},
        {"k": 1},
        {"d": 1},
        {"e": 1},
        {"q": 1, "k": 1, "d": 1, "e": 1, "b": 1, "h": 1},
        {"q": 17, "k": 3},
        {"d": 19, "e": 5},
        {"d": 5, "e": 19},
        {"d": 5, "e": 5},
        {"k": 67},
    ],
    ids=str,
)
def test_every_size(kernel: Kernel, sizes: dict[str, int]) -> None:
    inputs = qkv(**sizes)
    allowed = bools(inputs[0].shape[2], inputs[1].shape[2], seed=9)
    check(kernel, inputs, None, None, 1e-10)
    check(kernel, inputs, allowed, allowed, 1e-10)


@kernels
@pytest.mark.parametrize(
    "mask", [None, masks.Causal(), torch.ones(Q, 0, dtype=torch.bool)], ids=["none", "causal", "tensor"]
)
def test_no_keys_give_zeros(kernel: Kernel, mask: Mask | None) -> None:
    out, d_q, d_k, d_v = with_gradients(kernel, qkv(k=0), mask=mask)
    assert torch.equal(out, torch.zeros(B, H, Q, E, dtype=out.dtype))
    assert torch.equal(d_q, torch.zeros_like(d_q))
    assert d_k.shape == (B, H, 0, D) and d_v.shape == (B, H, 0, E)


@kernels
@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["none", "causal"])
def test_no_queries_give_no_rows_and_no_gradient(kernel: Kernel, mask: Mask | None) -> None:
    out, _, d_k, d_v = with_gradients(kernel, qkv(q=0), mask=mask)
    assert out.shape == (B, H, 0, E)
    assert not d_k.any() and not d_v.any()


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fully_masked_queries_give_zeros_and_no_gradient(kernel: Kernel, dtype: torch.dtype) -> None:
    allowed = torch.ones(B, 1, Q, K, dtype=torch.bool)
    allowed[1, :, 2] = False
    inputs = [x.to(dtype) for x in qkv()]
    results = with_gradients(kernel, inputs, mask=allowed)
    assert all(x.isfinite().all() for x in results)
    out, d_q, *_ = results
    assert not out[1, :, 2].any() and not d_q[1, :, 2].any()
    assert out[0, :, 2].all() and d_q[0, :, 2].all()
    # The other rows are unaffected by the fully masked one.
    rest = [0, 1, 3, 4]
    without = kernel(inputs[0][:, :, rest], *inputs[1:])
    torch.testing.assert_close(out[1][:, rest], without[1], rtol=0.0, atol=4 * torch.finfo(dtype).eps)


@kernels
@pytest.mark.parametrize(
    "mask",
    [torch.tensor(False), masks.Padding(torch.zeros(B, K, dtype=torch.bool)), masks.Window(before=-K, after=-K - Q)],
    ids=["tensor", "padding", "window"],
)
def test_masking_everything_gives_zeros(kernel: Kernel, mask: Mask) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for result in with_gradients(kernel, [x.to(dtype) for x in qkv()], mask=mask):
            assert torch.equal(result, torch.zeros_like(result))


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(kernel: Kernel, dtype: torch.dtype, sign: int) -> None:
    """The scores are exactly 1e4, 9600, -1e4 and 1e4 times the sign, so the softmax is of two or of one."""
    q = torch.tensor([100.0 * sign])[None, None, :, None].to(dtype)
    k = torch.tensor([100.0, 96.0, -100.0, 100.0])[None, None, :, None].to(dtype)
    v = torch.tensor([[3.0, 1.0], [50.0, 70.0], [-4.0, 8.0], [5.0, -7.0]])[None, None].to(dtype)
    expected = torch.tensor([4.0, -3.0] if sign > 0 else [-4.0, 8.0]).to(dtype)
    for mask in (None, torch.ones(1, 4, dtype=torch.bool)):
        results = with_gradients(kernel, [q, k, v], mask=mask)
        torch.testing.assert_close(results[0][0, 0, 0], expected, rtol=0.0, atol=0.0)
        assert all(x.isfinite().all() for x in results)


@kernels
def test_products_that_overflow_half_precision_before_they_are_scaled(kernel: Kernel) -> None:
    q, k = torch.full((1, 1, 2, 64), 40.0).half(), torch.full((1, 1, 3, 64), 40.0).half()  # 102,400 unscaled
    v = draw(1, 1, 3, 5).half()
    torch.testing.assert_close(kernel(q, k, v)[0, 0, 1], v[0, 0].mean(0), rtol=0.0, atol=2e-3)


@kernels
def test_inputs_that_are_not_contiguous(kernel: Kernel) -> None:
    q, k, v = draw(B, Q, H, D).transpose(1, 2), draw(D, K, H, B, seed=1).permute(3, 2, 1, 0), draw(B, H, K, 2 * E)
    inputs = [q, k, v[..., ::2]]
    assert not any(x.is_contiguous() for x in inputs)
    check(kernel, inputs, *MASKS["and"], 1e-10)
    shared = [draw(1, H, Q, D).expand(B, H, Q, D), *inputs[1:]]
    check(kernel, shared, None, None, 1e-10)


@kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str)
@pytest.mark.parametrize("name", ["none", "and"])
def test_autocast(kernel: Kernel, dtype: torch.dtype, tolerance: float, name: str) -> None:
    mask, allowed = MASKS[name]
    inputs = [x.float() for x in qkv()]
    with torch.autocast("cpu", dtype=dtype):
        results = with_gradients(kernel, inputs, mask=mask)
    assert [x.dtype for x in results[1:]] == [torch.float32] * 3
    agree(results, with_gradients(partial(exact, allowed=allowed), qkv()), tolerance)


@kernels
@pytest.mark.parametrize(
    "mapped", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, 0, None), (None, None, 0)], ids=str
)
def test_vmap_of_gradients_equals_a_loop(kernel: Kernel, mapped: tuple[int | None, ...]) -> None:
    """Any of the inputs may be shared between samples: latents, keys, or all but the values."""
    samples = 3
    inputs = [
        draw(samples, *x.shape, seed=i) if m == 0 else x for i, (x, m) in enumerate(zip(qkv(), mapped, strict=True))
    ]
    mask = bools(1, Q, K)
    mask[0, 1] = False

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, k, v, mask=mask).square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel has no batching rule
        gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2)), mapped)(*inputs)
    for i in range(samples):
        one = [(x[i] if m == 0 else x).detach().requires_grad_() for x, m in zip(inputs, mapped, strict=True)]
        expected = torch.autograd.grad(exact(*one, allowed=mask).square().sum(), one)
        for actual, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual[i], wanted, rtol=0.0, atol=1e-10)


@kernels
def test_vmap_over_masks(kernel: Kernel) -> None:
    inputs, many = qkv(), bools(3, B, 1, 1, K)
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.vmap(lambda mask: kernel(*inputs, mask=mask))(many)
    torch.testing.assert_close(out, torch.stack([exact(*inputs, allowed=m) for m in many]), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("mask", [None, DEAD_ROW], ids=["all", "masked"])
@pytest.mark.parametrize(
    "kernel", [partial(chunked, chunk_size=1), partial(chunked, chunk_size=2), sdpa], ids=["1", "2", "sdpa"]
)
def test_gradcheck(kernel: Kernel, mask: Tensor | None) -> None:
    inputs = [x.requires_grad_() for x in qkv(b=1, h=2, q=2, k=3, d=2, e=1)]
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(partial(kernel, mask=mask), inputs)


@pytest.mark.parametrize("kernel", [reference, sdpa])
def test_dropout_zeroes_weights_and_scales_the_rest(kernel: Kernel) -> None:
    """With the identity for values, the output is the weights themselves."""
    q, k, _ = (x.expand(101, *x.shape[1:]) for x in qkv(b=1))
    torch.manual_seed(0)
    dropped = kernel(q, k, torch.eye(K, dtype=q.dtype).expand(101, H, K, K), dropout=0.3)
    weights = attention_map(q, k)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (weights / 0.7)[kept], rtol=1e-10, atol=0.0)
    deviation = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - 0.7) < 5 * deviation


@pytest.mark.parametrize("kernel", [reference, sdpa])
@pytest.mark.parametrize("mask", [None, masks.and_(masks.Causal(), masks.Padding(PAD[:1]))], ids=["all", "masked"])
def test_dropout_keeps_the_expectation(kernel: Kernel, mask: Mask | None) -> None:
    copies = 2003
    one = qkv(b=1)
    torch.manual_seed(0)
    many = kernel(*(x.expand(copies, *x.shape[1:]) for x in one), mask=mask, dropout=0.2)
    error = (many.mean(0) - kernel(*one, mask=mask)[0]).abs()
    assert bool((error <= 5 * many.std(0) / copies**0.5).all())
    assert many.std(0).max() > 0.1


@pytest.mark.parametrize("kernel", [reference, sdpa])
def test_dropout_is_off_by_default(kernel: Kernel) -> None:
    first = kernel(*qkv())
    assert torch.equal(first, kernel(*qkv(), dropout=0.0))
    assert torch.equal(first, kernel(*qkv()))
    assert not torch.equal(first, kernel(*qkv(), dropout=0.5))


@pytest.mark.refusal
@kernels
def test_masks_of_another_shape_or_dtype_raise(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match=r"mask must broadcast to \(2, 3, 5, 11\); got shape \(5, 7\)"):
        kernel(*qkv(), mask=bools(Q, 7))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor.*got torch.float32"):
        kernel(*qkv(), mask=torch.ones(Q, K))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor.*got torch.int64"):
        kernel(*qkv(), mask=lambda q, k: k.expand(len(q), -1))
