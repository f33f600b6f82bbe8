"""Chunked attention: memory, and the algebra of partial results."""

from __future__ import annotations

import functools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perceiver_core import masks
from perceiver_core.kernels import PartialAttention, chunked, merge, partial_attention, reference
from perceiver_core.masks import Mask
from tests.kernels.cases import B, D, E, H, K, Kernel, Q, bools, draw, qkv, seeds
from tests.memory import Largest

laws = settings(max_examples=30, derandomize=True, deadline=None, database=None)


def log_sum_exp(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.logsumexp(-1)


def same(actual: PartialAttention, expected: PartialAttention) -> None:
    torch.testing.assert_close(actual.output, expected.output, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(actual.lse, expected.lse, rtol=0.0, atol=1e-12)


# Memory


def largest_made(kernel, mask: Mask | None) -> int:  # type: ignore[no-untyped-def]
    q, k, v = (x.requires_grad_() for x in (draw(1, 2, 53, 3), draw(1, 2, 1009, 3), draw(1, 2, 1009, 2)))
    with Largest() as largest:
        kernel(q, k, v, mask=mask).sum().backward()
    return largest.size


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.Causal(),
        masks.Padding(bools(1, 1009)),
        bools(1, 2, 53, 1009),
        masks.and_(masks.Window(500, 3), bools(53, 1009), lambda q, k: (q[:, None] + k) % 2 == 0),
    ],
    ids=["none", "causal", "padding", "tensor", "and"],
)
def test_no_tensor_of_queries_times_keys_is_allocated(mask: Mask | None) -> None:
    """The largest tensor is a gradient of the keys, or the scores of one chunk."""
    kernel = functools.partial(chunked, chunk_size=17)
    assert largest_made(kernel, mask) <= max(2 * 53 * 17, 2 * 1009 * 3)
    assert largest_made(reference, mask) >= 2 * 53 * 1009  # which the measurement detects


def test_autocast_does_not_narrow_the_sums() -> None:
    """Forward and backward passes of chunks have the same precision inside autocast as outside."""
    leaves = [x.float().requires_grad_() for x in qkv()]

    def results() -> list[Tensor]:
        out = chunked(*leaves, mask=masks.Causal(), chunk_size=4)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    outside = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


# Partial results


@pytest.mark.parametrize("chunk", [1, 4, K, 4096])
def test_a_partial_result_is_the_output_and_the_log_sum_exp(chunk: int) -> None:
    q, k, v = qkv()
    mask = bools(B, 1, Q, K)
    mask[0, :, 3] = False
    output, lse = partial_attention(q, k, v, mask=mask, chunk_size=chunk)
    torch.testing.assert_close(output, reference(q, k, v, mask=mask), rtol=0.0, atol=1e-10)
    torch.testing.assert_close(lse, log_sum_exp(q, k, mask), rtol=0.0, atol=1e-10)
    assert (lse[0, :, 3] == -math.inf).all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_dtypes_of_partial_and_merged_results(dtype: torch.dtype, wide: torch.dtype) -> None:
    part = partial_attention(*(x.to(dtype) for x in qkv()))
    for output, lse in (part, merge(part, part)):
        assert (output.dtype, lse.dtype) == (dtype, wide)


def test_gradients_through_the_output_and_the_log_sum_exp() -> None:
    q, k, v = (x.requires_grad_() for x in (draw(1, 2, 2, 3), draw(1, 2, 3, 3, seed=1), draw(1, 2, 3, 2, seed=2)))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: tuple(partial_attention(q, k, v, mask=mask, chunk_size=2)), (q, k, v)
    )


def test_gradient_of_the_log_sum_exp_alone() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = bools(B, 1, Q, K)
    mask[0, :, 3] = False
    some = mask.any(-1).expand(B, H, Q)
    probe = draw(B, H, Q)[some]
    lse = partial_attention(q, k, v, mask=mask, chunk_size=4).lse
    actual = torch.autograd.grad((lse[some] * probe).sum(), (q, k, v))
    formula = log_sum_exp(q, k, mask | ~mask.any(-1, keepdim=True))
    expected = torch.autograd.grad((formula[some] * probe).sum(), (q, k))
    for a, e in zip(actual, expected, strict=False):
        torch.testing.assert_close(a, e, rtol=0.0, atol=1e-10)
    assert not actual[2].any()


@pytest.mark.refusal
@pytest.mark.parametrize("chunk", [0, -1, 2.0, True])
def test_chunk_sizes_that_are_not_positive_integers_raise(chunk: object) -> None:
    with pytest.raises(ValueError, match=rf"chunk_size must be a whole number of at least 1; got {chunk!r}"):
        chunked(*qkv(), chunk_size=chunk)


# Merging


def split(k: Tensor, v: Tensor, mask: Tensor, owner: list[int], parts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Splits keys and values into parts by owner; a part may be empty."""
    own = torch.tensor(owner)
    return [(k[:, :, own == i], v[:, :, own == i], mask[..., own == i]) for i in range(parts)]


@laws
@given(seed=seeds, owner=st.lists(st.integers(0, 3), min_size=1, max_size=17), chunk=st.integers(1, 19))
def test_merged_parts_equal_attention_to_all_keys(seed: int, owner: list[int], chunk: int) -> None:
    """Over any split, empty parts included, with a mask, forward and backward, output and log-sum-exp."""
    n = len(owner)
    leaves = [x.requires_grad_() for x in qkv(k=n, seed=seed)]
    q, k, v = leaves
    mask = bools(B, 1, Q, n, seed=seed)
    some = mask.any(-1).expand(B, H, Q)
    merged = merge(
        *(partial_attention(q, *part, mask=m, chunk_size=chunk) for *part, m in split(k, v, mask, owner, parts=4))
    )
    expected = PartialAttention(reference(q, k, v, mask=mask), log_sum_exp(q, k, mask))
    same(merged, expected)

    def gradients(of: PartialAttention) -> tuple[Tensor, ...]:
        loss = (of.output * draw(B, H, Q, E, seed=5)).sum() + (of.lse[some] * draw(B, H, Q, seed=6)[some]).sum()
        return torch.autograd.grad(loss, leaves)

    safe = PartialAttention(expected.output, log_sum_exp(q, k, mask | ~mask.any(-1, keepdim=True)))
    for a, e in zip(gradients(merged), gradients(safe), strict=True):
        torch.testing.assert_close(a, e, rtol=0.0, atol=1e-10)


def three_parts(seed: int) -> list[PartialAttention]:
    q = draw(B, H, Q, D, seed=seed)
    parts = []
    for i, n in enumerate((3, 7, 2)):
        _, k, v = qkv(k=n, seed=seed + 10 * i)
        parts.append(partial_attention(q, 3 * k, v, mask=bools(B, 1, Q, n, seed=seed + i)))
    return parts


@laws
@given(seed=seeds)
def test_merging_is_commutative_and_associative(seed: int) -> None:
    a, b, c = three_parts(seed)
    same(merge(a, b, c), merge(c, a, b))
    same(merge(a, b, c), merge(merge(a, b), c))
    same(merge(a, b, c), merge(a, merge(b, c)))


@laws
@given(seed=seeds)
def test_an_empty_part_is_the_identity_of_merge(seed: int) -> None:
    q, k, v = qkv(seed=seed)
    part = partial_attention(q, k, v, mask=bools(B, 1, Q, K, seed=seed))
    empty = partial_attention(q, k[:, :, :0], v[:, :, :0])
    masked = partial_attention(q, k, v, mask=torch.tensor(False))
    assert (empty.lse == -math.inf).all() and not empty.output.any()
    same(masked, empty)
    same(merge(part), part)
    for nothing in (empty, masked):
        same(merge(part, nothing), part)
        same(merge(nothing, part), part)
    same(merge(empty, masked), empty)


def test_gradients_of_empty_parts_are_zero() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    q, k, v = leaves
    nothing = partial_attention(q, k, v, mask=torch.tensor(False))
    for merged in (merge(nothing, nothing), merge(nothing, PartialAttention(draw(B, H, Q, E), draw(B, H, Q)))):
        for gradient in torch.autograd.grad(merged.output.sum(), leaves, retain_graph=True):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_merge_is_differentiable() -> None:
    outputs, lses = [draw(1, 1, 2, 3, seed=i) for i in range(3)], [draw(1, 1, 2, seed=i + 5) for i in range(3)]
    leaves = [x.requires_grad_() for x in (*outputs, *lses)]

    def merged(*xs: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(merge(*(PartialAttention(o, m) for o, m in zip(xs[:3], xs[3:], strict=True))))

    assert torch.autograd.gradcheck(merged, leaves)
    assert torch.autograd.gradgradcheck(merged, leaves)


def test_parts_of_very_different_size_merge_without_overflow() -> None:
    q, k, v = (x.float() for x in qkv())
    small, large = partial_attention(q, k, v), partial_attention(q, k, v + 1.0)
    large = PartialAttention(large.output, large.lse + 1e4)
    merged = merge(small, large)
    torch.testing.assert_close(merged.output, large.output, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(merged.lse, large.lse, rtol=1e-6, atol=0.0)


@pytest.mark.refusal
def test_merging_no_parts_raises() -> None:
    with pytest.raises(ValueError, match="merge needs at least one part; got none"):
        merge()


def test_second_derivatives_of_chunked_raise() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    (d_q,) = torch.autograd.grad(chunked(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match="chunked attention is differentiable once; for second derivatives use kernel"
    ):
        d_q.sum().backward()


def test_second_derivatives_that_reach_only_the_inputs_raise() -> None:
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


def test_per_sample_gradients_with_a_mask_per_sample() -> None:
    q, k, v = qkv()
    keys = torch.rand(q.shape[0], k.shape[-2], generator=torch.Generator().manual_seed(1)) < 0.6

    def loss(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, kernel: Kernel) -> Tensor:
        rule = masks.and_(masks.Padding(keys[None]), masks.Causal())
        return kernel(q[None], k[None], v[None], mask=rule).square().sum()

    def each(kernel: Kernel) -> Tensor:
        return torch.func.vmap(torch.func.grad(partial(loss, kernel=kernel)))(q, k, v, keys)

    found, wanted = each(chunked), each(reference)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_chunked_accepts_no_dropout() -> None:
    with pytest.raises(TypeError, match="dropout"):
        chunked(*qkv(), dropout=0.1)  # type: ignore[call-arg]
