"""Packed keys in place of padding: when keys are packed, and the result against the formula, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perceiver_core import masks
from perceiver_core.kernels import reference, sdpa, varlen
from perceiver_core.kernels.grid import missing_kernel
from perceiver_core.kernels.sdpa import kernel_for


class _LeavesGarbage(torch.autograd.Function):
    """Fills the gradient of keys that belong to no sample with NaN, as uninitialized memory may."""

    @staticmethod
    def forward(ctx, x: Tensor, number: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.number = number
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        gradient = gradient.clone()
        gradient[ctx.number :] = torch.nan
        return gradient, None


def emulated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    most_q: int,
    most_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """Emulates PyTorch's kernel for packed keys sample by sample; NaN for a sample without keys."""
    outs = []
    q_ends, k_ends = q_starts.tolist(), k_starts.tolist()
    for most, ends in ((most_q, q_ends), (most_k, k_ends)):
        assert most >= max(b - a for a, b in itertools.pairwise(ends))
    assert q_starts.dtype == k_starts.dtype == torch.int32
    k, v = (_LeavesGarbage.apply(x, k_ends[-1]) for x in (k, v))
    for sample in range(len(q_ends) - 1):
        own = slice(q_ends[sample], q_ends[sample + 1])
        read = slice(k_ends[sample], k_ends[sample + 1])
        scores = torch.einsum("mhd,nhd->hmn", q[own], k[read]) * scale
        if window_size == (-1, 0):  # aligned at the end
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
            scores = scores.masked_fill(later, -torch.inf)
        out = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v[read])
        outs.append(out if read.start < read.stop else out * torch.nan)
    return torch.cat(outs)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lets `sdpa` use packed keys on this device; records the shapes of the keys."""
    seen: list[tuple[int, ...]] = []

    def noted(q: Tensor, k: Tensor, *rest: Tensor | int, **named: object) -> Tensor:
        seen.append(tuple(k.shape))
        return emulated(q, k, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen, "is_supported", lambda q: True)
    monkeypatch.setattr(varlen, "_varlen", lambda: noted)
    return seen


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


PATTERNS: dict[str, Callable[[], Tensor]] = {
    "at the end": lambda: torch.arange(11) < torch.tensor([[3], [11], [1]]),
    "at the start": lambda: torch.arange(11) >= torch.tensor([[3], [0], [10]]),
    "anywhere": lambda: torch.rand(3, 11, generator=torch.Generator().manual_seed(5)) < 0.5,
    "none in one sample": lambda: torch.tensor([[True], [False], [True]]) & (torch.arange(11) != 4),
    "none at all": lambda: torch.zeros(3, 11, dtype=torch.bool),
    "one row for all": lambda: torch.arange(11)[None] < 4,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("queries", [1, 5])
def test_it_equals_masked_attention(pattern: str, queries: int, packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS[pattern]()
    leaves = [draw(3, 2, n, width, seed=i) for i, (n, width) in enumerate([(queries, 6), (11, 6), (11, 4)])]
    results = []
    for kernel in (sdpa, reference):
        out = kernel(*leaves, mask=masks.Padding(there))
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    assert packed == [(33, 2, 6)]


def test_masked_keys_have_no_effect(packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS["anywhere"]()
    q, k, v = (draw(3, 2, 11, 4, seed=i).detach() for i in range(3))
    expected = sdpa(q, k, v, mask=masks.Padding(there))
    k, v = (x.masked_fill(~there[:, None, :, None], torch.nan) for x in (k, v))
    torch.testing.assert_close(sdpa(q, k, v, mask=masks.Padding(there)), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 11), (4, 11), (10, 11)])
def test_causal_attention_of_the_last_queries(queries: int, keys: int, packed: list[tuple[int, ...]]) -> None:
    leaves = [draw(3, 2, n, width, seed=i) for i, (n, width) in enumerate([(queries, 6), (keys, 6), (keys, 4)])]
    results = []
    for kernel in (sdpa, reference):
        out = kernel(*leaves, mask=masks.Causal())
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    assert packed == [(3 * keys, 2, 6)]


@pytest.mark.parametrize("queries", [11, 13])
def test_other_causal_attention_is_not_packed(queries: int, packed: list[tuple[int, ...]]) -> None:
    q, k, v = (draw(3, 2, n, 4, seed=i).detach() for i, n in enumerate((queries, 11, 11)))
    torch.testing.assert_close(sdpa(q, k, v, mask=masks.Causal()), reference(q, k, v, mask=masks.Causal()))
    assert packed == []


def test_other_masks_are_not_packed(packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS["anywhere"]()
    q, k, v = (draw(3, 2, 11, 4, seed=i).detach() for i in range(3))
    for mask in (masks.and_(masks.Padding(there), masks.Causal()), there[:, None, :, None] & there[:, None, None, :]):
        assert varlen.valid_keys(mask) is None
        torch.testing.assert_close(sdpa(q, k, v, mask=mask), reference(q, k, v, mask=mask))
    both = masks.and_(masks.Padding(there), masks.Padding(there.flip(1)))
    assert torch.equal(varlen.valid_keys(both), there & there.flip(1))
    assert packed == []


def test_dropout_is_not_packed(packed: list[tuple[int, ...]]) -> None:
    q, k, v = (draw(3, 2, 11, 4, seed=i).detach() for i in range(3))
    sdpa(q, k, v, mask=masks.Padding(PATTERNS["anywhere"]()), dropout=0.5)
    assert packed == []


def test_the_gradient_of_packing_restores_the_order() -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    x = draw(7, 2, 3, seed=0)
    for there in (torch.ones(7, dtype=torch.bool), order < 3):
        assert torch.autograd.gradcheck(lambda x, there=there: varlen._Reordered.apply(x, order, there), x)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masked_keys_affect_neither_output_nor_gradients(pattern: str, packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS[pattern]()
    leaves = [draw(3, 2, 11, 4, seed=i) for i in range(3)]
    for i in (1, 2):
        leaves[i] = leaves[i].detach().masked_fill(~there[:, None, :, None], torch.nan).requires_grad_()
    out = sdpa(*leaves, mask=masks.Padding(there))
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and all(x.isfinite().all() for x in gradients)
    assert not any(x.masked_select(~there[:, None, :, None]).any() for x in gradients[1:])


def test_functional_transforms_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "why_not", lambda *_: "")
    monkeypatch.setattr(varlen, "has_varlen", lambda: True)
    seen = []
    torch.func.grad(lambda x: (seen.append(varlen.is_supported(x)), x.sum())[1])(torch.zeros(1, 1, 2, 8))
    assert seen == [False] and varlen.is_supported(torch.zeros(1, 1, 2, 8))


H200 = torch.device("cuda")


@pytest.mark.parametrize(
    ("widths", "dtype", "mask", "name", "why"),
    [
        ((64, 64), torch.bfloat16, None, "flash or cuDNN", ""),
        ((250, 96), torch.float16, None, "flash or cuDNN", ""),
        ((261, 261), torch.bfloat16, None, "memory-efficient", "up to 256 wide, not 264"),
        ((64, 322), torch.bfloat16, None, "memory-efficient", "up to 256 wide, not 328"),
        ((64, 64), torch.float32, None, "memory-efficient", "not float32; use torch.autocast"),
        ((64, 64), torch.float64, None, "math", "not float64; use torch.autocast"),
        ((64, 64), torch.bfloat16, masks.Causal(), "flash, packed", ""),
        ((64, 64), torch.bfloat16, masks.Padding(torch.ones(1, 2).bool()), "flash, packed", ""),
        ((64, 64), torch.bfloat16, torch.ones(1, 1, 2, 2).bool(), "cuDNN or memory-efficient", "key-padding masks"),
    ],
)
def test_kernel_for_returns_the_kernel_and_the_reason(widths, dtype, mask, name, why, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "has_varlen", lambda: True)
    actual = kernel_for(*widths, dtype, H200, mask)
    assert actual.name == name and why in actual.why and bool(why) == bool(actual.why)


def test_older_gpus_and_older_pytorch_use_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in kernel_for(64, 64, torch.float16, H200).why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(varlen, "has_varlen", lambda: False)
    assert "2.11" in kernel_for(64, 64, torch.float16, H200, masks.Causal()).why


@pytest.mark.compile
def test_the_gpu_capability_is_known_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def queried(x: Tensor) -> Tensor:
        if not varlen.why_not(torch.bfloat16, 64, H200) and varlen.has_varlen() is not None:
            x = x + 1
        return x if missing_kernel(torch.device("meta"), x.shape[-1]) else x + 1

    x = torch.zeros(3)
    assert torch.equal(torch.compile(queried, fullgraph=True, dynamic=True)(x), x + 1)


def test_nothing_is_packed_on_a_cpu() -> None:
    assert not varlen.is_supported(torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16))
