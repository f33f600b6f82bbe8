"""Every kernel against the formula in float64, forward and backward, and the laws that attention obeys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from perceiver_core import Tokens
from perceiver_core import masks
from perceiver_core.kernels import attention_map, chunked, reference, sdpa
from perceiver_core.masks import Mask
from perceiver_core.kernels.sdpa import fused_width

B, H, Q, K, D, E = 2, 3, 5, 11, 7, 13

CHUNKS = (1, 3, 64)
KERNELS = {"reference": reference, "sdpa": sdpa, **{f"chunked{c}": partial(chunked, chunk_size=c) for c in CHUNKS}}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
laws = settings(max_examples=20, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**16)

Kernel = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(b: int = B, h: int = H, q: int = Q, k: int = K, d: int = D, e: int = E, seed: int = 0) -> list[Tensor]:
    return [draw(b, h, q, d, seed=seed), draw(b, h, k, d, seed=seed + 1), draw(b, h, k, e, seed=seed + 2)]


def exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """exp over sum of exp, over the keys that are allowed; zeros where there are none."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    here = torch.ones_like(scores) if allowed is None else allowed.expand_as(scores).double()
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * here
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhke->bhqe", weights / total.where(total > 0, 1.0), v)


def with_gradients(kernel: Kernel, inputs: list[Tensor], **kwargs: Mask | None) -> list[Tensor]:
    """The output, and the gradients of a sum of it with uneven weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = kernel(*leaves, **kwargs)
    probe = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out.double() * probe).sum(), leaves)]


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        scale = max(1.0, float(e.abs().max()) if e.numel() else 0.0)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=0.0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def check(kernel: Kernel, inputs: list[Tensor], mask: Mask | None, allowed: Tensor | None, tolerance: float) -> None:
    expected = with_gradients(partial(exact, allowed=allowed), [x.double() for x in inputs])
    agree(with_gradients(kernel, inputs, mask=mask), expected, tolerance)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def broadcastable_shapes() -> Iterator[tuple[int, ...]]:
    full = (B, H, Q, K)
    for axes in range(5):
        yield from product(*((1, size) for size in full[4 - axes :]))


def grid_of(rule: Callable[[int, int], bool]) -> Tensor:
    """A rule of positions counted from the start, aligned at the ends, one pair at a time."""
    return torch.tensor([[rule(i + K - Q, j) for j in range(K)] for i in range(Q)])


PAD, WANTED, ANY = bools(B, K, seed=3), bools(B, Q, seed=4), bools(H, 1, K, seed=5)
CAUSAL, NEAR = grid_of(lambda i, j: j <= i), grid_of(lambda i, j: i - 3 <= j <= i + 1)
MASKS: dict[str, tuple[Mask | None, Tensor | None]] = {
    "none": (None, None),
    "padding": (masks.Padding(PAD), PAD[:, None, None, :]),
    "padding of all samples": (masks.Padding(PAD[:1]), PAD[:1, None, None, :]),
    "queries": (masks.Queries(WANTED), WANTED[:, None, :, None]),
    "causal": (masks.Causal(), CAUSAL),
    "window": (masks.Window(before=3, after=1), NEAR),
    "and": (masks.and_(masks.Causal(), None, masks.Padding(PAD), ANY), CAUSAL & PAD[:, None, None, :] & ANY),
    "or": (masks.or_(masks.Window(3, 1), masks.Padding(PAD), ANY), NEAR | PAD[:, None, None, :] | ANY),
    "function": (lambda q, k: (q[:, None] + k) % 3 != 0, grid_of(lambda i, j: (i + j - 2 * K) % 3 != 0)),
    "function of keys": (lambda q, k: k % 2 == 0, torch.tensor([(j - K) % 2 == 0 for j in range(K)])),
}


@kernels
@pytest.mark.parametrize(("mask", "allowed"), MASKS.values(), ids=MASKS.keys())
def test_every_kernel_is_the_formula_under_every_mask(
    kernel: Kernel, mask: Mask | None, allowed: Tensor | None
) -> None:
    check(kernel, qkv(), mask, allowed, 1e-10)


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
def test_a_query_with_nothing_to_attend_to_gives_zeros_and_no_gradient(kernel: Kernel, dtype: torch.dtype) -> None:
    allowed = torch.ones(B, 1, Q, K, dtype=torch.bool)
    allowed[1, :, 2] = False
    inputs = [x.to(dtype) for x in qkv()]
    results = with_gradients(kernel, inputs, mask=allowed)
    assert all(x.isfinite().all() for x in results)
    out, d_q, *_ = results
    assert not out[1, :, 2].any() and not d_q[1, :, 2].any()
    assert out[0, :, 2].all() and d_q[0, :, 2].all()
    # The other rows are as if the dead one had never been there.
    rest = [0, 1, 3, 4]
    without = kernel(inputs[0][:, :, rest], *inputs[1:])
    torch.testing.assert_close(out[1][:, rest], without[1], rtol=0.0, atol=4 * torch.finfo(dtype).eps)


@kernels
@pytest.mark.parametrize(
    "mask",
    [torch.tensor(False), masks.Padding(torch.zeros(B, K, dtype=torch.bool)), masks.Window(before=-K, after=-K - Q)],
    ids=["tensor", "padding", "window"],
)
def test_everything_masked_gives_zeros(kernel: Kernel, mask: Mask) -> None:
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


def test_sdpa_under_autocast_gives_the_dtype_of_autocast_and_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sdpa(*(x.float() for x in qkv())).dtype == torch.bfloat16
        assert sdpa(*qkv()).dtype == torch.float64


@kernels
@pytest.mark.parametrize(
    "mapped", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, 0, None), (None, None, 0)], ids=str
)
def test_vmap_of_gradients_equals_a_loop(kernel: Kernel, mapped: tuple[int | None, ...]) -> None:
    """Whichever inputs differ between samples: shared latents, shared keys, shared all but the values."""
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


DEAD_ROW = torch.tensor([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("mask", [None, DEAD_ROW], ids=["all", "masked"])
@pytest.mark.parametrize("kernel", [partial(chunked, chunk_size=1), partial(chunked, chunk_size=2), sdpa], ids=["1", "2", "sdpa"])
def test_gradcheck(kernel: Kernel, mask: Tensor | None) -> None:
    inputs = [x.requires_grad_() for x in qkv(b=1, h=2, q=2, k=3, d=2, e=1)]
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(partial(kernel, mask=mask), inputs)


@pytest.mark.parametrize("mask", [None, DEAD_ROW], ids=["all", "masked"])
def test_the_reference_is_twice_differentiable(mask: Tensor | None) -> None:
    inputs = [x.requires_grad_() for x in qkv(b=1, h=2, q=2, k=3, d=2, e=1)]
    assert torch.autograd.gradgradcheck(partial(reference, mask=mask), inputs)


def test_chunked_says_that_it_is_differentiable_once() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    (d_q,) = torch.autograd.grad(chunked(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match="chunked attention is differentiable once; for second derivatives use kernel"
    ):
        d_q.sum().backward()


def test_chunked_refuses_second_derivatives_that_reach_only_its_inputs() -> None:
    """The incoming gradient is a constant here; the weights still depend on the inputs."""
    q, k, v = qkv()
    layer = torch.nn.Linear(q.shape[-1], q.shape[-1]).to(q)
    z = layer(q).requires_grad_()
    x = q.clone().requires_grad_()
    (d_x,) = torch.autograd.grad(chunked(layer(x), k, v).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        d_x.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: chunked(q, k, v).sum())(q).square().sum())(z.detach())


def test_chunked_gradients_of_each_sample_with_a_mask_of_its_own() -> None:
    q, k, v = qkv()
    keys = torch.rand(q.shape[0], k.shape[-2], generator=torch.Generator().manual_seed(1)) < 0.6

    def loss(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, kernel: Kernel) -> Tensor:
        rule = masks.and_(masks.Padding(keys[None]), masks.Causal())
        return kernel(q[None], k[None], v[None], mask=rule).square().sum()

    def each(kernel: Kernel) -> Tensor:
        return torch.func.vmap(torch.func.grad(partial(loss, kernel=kernel)))(q, k, v, keys)

    found, wanted = each(chunked), each(reference)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# Dropout


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
def test_no_dropout_unless_asked(kernel: Kernel) -> None:
    first = kernel(*qkv())
    assert torch.equal(first, kernel(*qkv(), dropout=0.0))
    assert torch.equal(first, kernel(*qkv()))
    assert not torch.equal(first, kernel(*qkv(), dropout=0.5))


def test_chunked_takes_no_dropout() -> None:
    with pytest.raises(TypeError, match="dropout"):
        chunked(*qkv(), dropout=0.1)  # type: ignore[call-arg]


# What is special about sdpa


@pytest.mark.parametrize(
    ("widths", "device", "fused"),
    [
        ((261, 17), "cpu", 261),
        ((17, 261), "cpu", 261),
        ((261, 17), "cuda", 264),
        ((17, 261), "cuda", 264),
        ((1, 1), "cuda", 8),
        ((64, 64), "cuda", 64),
        ((64, 65), "cuda", 72),
        ((64, 64), "cpu", 64),
    ],
)
def test_fused_width(widths: tuple[int, int], device: str, fused: int) -> None:
    assert fused_width(*widths, torch.device(device)) == fused


@pytest.mark.parametrize(("d", "e"), [(261, 17), (17, 261), (64, 65), (3, 3)])
def test_padding_the_widths_changes_nothing(d: int, e: int) -> None:
    for mask, allowed in (MASKS["none"], MASKS["and"]):
        check(sdpa, qkv(d=d, e=e), mask, allowed, 1e-10)
        assert sdpa(*qkv(d=d, e=e), mask=mask).shape == (B, H, Q, e)


@pytest.mark.parametrize(("q", "k", "is_causal"), [(7, 7, True), (5, 7, False), (7, 5, False)])
def test_is_causal_only_where_queries_and_keys_line_up(
    q: int, k: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch aligns the first query with the first key; we align the last with the last."""
    seen: list[dict[str, object]] = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append(kwargs)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    inputs = qkv(q=q, k=k)
    out = sdpa(*inputs, mask=masks.Causal())
    assert [bool(kwargs.get("is_causal")) for kwargs in seen] == [is_causal]
    assert ("attn_mask" in seen[0]) is not is_causal
    causal = torch.tensor([[j - k <= i - q for j in range(k)] for i in range(q)])
    torch.testing.assert_close(out, exact(*inputs, allowed=causal), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("name", ["none", "padding", "causal", "and", "function"])
def test_unequal_widths_and_masks_still_run_the_fused_kernel(name: str) -> None:
    inputs = [x.float() for x in qkv()]
    with profile(activities=[ProfilerActivity.CPU]) as events:
        sdpa(*inputs, mask=MASKS[name][0])
    names = {event.name for event in events.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


# The attention map


@pytest.mark.parametrize(("mask", "allowed"), MASKS.values(), ids=MASKS.keys())
def test_the_map_adds_to_one_or_to_zero_and_times_the_values_is_the_output(
    mask: Mask | None, allowed: Tensor | None
) -> None:
    q, k, v = qkv()
    weights = attention_map(q, k, mask=mask)
    full = torch.ones(B, H, Q, K, dtype=torch.bool) if allowed is None else allowed.expand(B, H, Q, K)
    torch.testing.assert_close(weights.sum(-1), full.any(-1).double(), rtol=0.0, atol=1e-12)
    assert not weights[~full].any() and (weights[full] > 0).all()
    torch.testing.assert_close(weights @ v, reference(q, k, v, mask=mask), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(weights @ v, exact(q, k, v, allowed), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(("mask", "_"), MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("chosen", [[0], [-1], [3, 1], [-2, 0, 4, 4], []], ids=str)
def test_chosen_queries_are_rows_of_the_whole_map(mask: Mask | None, _: Tensor | None, chosen: list[int]) -> None:
    q, k, _v = qkv()
    whole = attention_map(q, k, mask=mask)
    indices = torch.tensor(chosen, dtype=torch.long)
    rows = attention_map(q, k, mask=mask, queries=indices)
    assert rows.shape == (B, H, len(chosen), K)
    torch.testing.assert_close(rows, whole[:, :, indices], rtol=0.0, atol=1e-14)
    if chosen:
        assert torch.equal(attention_map(q, k, mask=mask, queries=chosen), rows)


def test_the_map_of_half_precision_is_float32() -> None:
    q, k, _ = (x.bfloat16() for x in qkv())
    weights = attention_map(q, k)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), attention_map(q.double(), k.double()), rtol=0.0, atol=1e-6)


@kernels
def test_a_mask_that_does_not_fit_is_refused(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match=r"mask must broadcast to \(2, 3, 5, 11\); got shape \(5, 7\)"):
        kernel(*qkv(), mask=bools(Q, 7))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor.*got torch.float32"):
        kernel(*qkv(), mask=torch.ones(Q, K))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor.*got torch.int64"):
        kernel(*qkv(), mask=lambda q, k: k.expand(len(q), -1))


# Laws


@kernels
@laws
@given(seed=seeds, n=st.integers(1, 13))
def test_the_order_of_tokens_does_not_matter(kernel: Kernel, seed: int, n: int) -> None:
    q, k, v = qkv(k=n, seed=seed)
    mask = bools(B, 1, Q, n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = kernel(q, k[:, :, order], v[:, :, order], mask=mask[..., order])
    torch.testing.assert_close(shuffled, kernel(q, k, v, mask=mask), rtol=0.0, atol=1e-10)


@kernels
@laws
@given(seed=seeds, junk=st.floats(-1e6, 1e6, width=32))
def test_masked_tokens_are_inert(kernel: Kernel, seed: int, junk: float) -> None:
    q, k, v = qkv(seed=seed)
    pad = bools(B, K, seed=seed)
    gone = ~pad[:, None, :, None]
    results = with_gradients(kernel, [q, k, v], mask=masks.Padding(pad))
    changed = with_gradients(
        kernel, [q, k.masked_fill(gone, junk), v.masked_fill(gone, -junk)], mask=masks.Padding(pad)
    )
    agree(changed, results, 1e-10)
    _, _, d_k, d_v = changed
    assert not d_k.masked_select(gone).any() and not d_v.masked_select(gone).any()


@kernels
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_masked_tokens_may_hold_anything_once_tokens_has_written_them_out(kernel: Kernel, junk: float) -> None:
    pad = bools(B, K, seed=6)
    content = draw(B, K, D)

    def read(content: Tensor) -> list[Tensor]:
        leaf = content.requires_grad_()
        x = Tokens(leaf, mask=pad).materialize()[:, None]
        out = kernel(draw(B, 1, Q, D, seed=1), x, x, mask=masks.Padding(pad))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaf)]

    clean = read(content.clone())
    for a, b in zip(read(content.masked_fill(~pad[..., None], junk)), clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


@kernels
@laws
@given(seed=seeds)
def test_samples_and_heads_are_independent(kernel: Kernel, seed: int) -> None:
    inputs, others = qkv(seed=seed), qkv(seed=seed + 7)
    mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip(inputs, others, strict=True)]
    torch.testing.assert_close(kernel(*mixed)[0], kernel(*inputs)[0], rtol=0.0, atol=1e-12)
    one_head = kernel(*(x[:, 1:2] for x in inputs))
    torch.testing.assert_close(one_head, kernel(*inputs)[:, 1:2], rtol=0.0, atol=1e-12)


@kernels
@laws
@given(seed=seeds, shift=st.floats(-50, 50))
def test_a_shift_of_all_scores_and_of_all_values(kernel: Kernel, seed: int, shift: float) -> None:
    """The same number added to every key's score changes nothing; added to every value, it is added to the output."""
    q, k, v = qkv(seed=seed)
    out = kernel(q, k, v)
    torch.testing.assert_close(kernel(q, k + shift * draw(B, H, 1, D), v), out, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(kernel(q, k, v + shift), out + shift, rtol=0.0, atol=1e-10)
