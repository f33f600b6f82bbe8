"""Padding as packed keys: what is packed, and attention to it against the formula, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from perceiver_core.attention import masks, ragged, reference, sdpa


def emulated(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, most_q: int, most_k: int, *, scale: float
) -> Tensor:
    """What PyTorch's kernel for packed keys computes, sample by sample; NaN for a sample without keys."""
    outs = []
    q_ends, k_ends = q_starts.tolist(), k_starts.tolist()
    assert most_q >= max(b - a for a, b in zip(q_ends, q_ends[1:], strict=False))
    assert most_k >= max(b - a for a, b in zip(k_ends, k_ends[1:], strict=False))
    for sample in range(len(q_ends) - 1):
        own = slice(q_ends[sample], q_ends[sample + 1])
        read = slice(k_ends[sample], k_ends[sample + 1])
        weights = (torch.einsum("mhd,nhd->hmn", q[own], k[read]) * scale).softmax(-1)
        out = torch.einsum("hmn,nhd->mhd", weights, v[read])
        outs.append(out if read.start < read.stop else out * torch.nan)
    return torch.cat(outs)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """`sdpa` takes packed keys on this device; the shapes of the keys that came."""
    seen: list[tuple[int, ...]] = []

    def noted(q: Tensor, k: Tensor, *rest: Tensor | int, scale: float) -> Tensor:
        seen.append(tuple(k.shape))
        return emulated(q, k, *rest, scale=scale)  # type: ignore[arg-type]

    monkeypatch.setattr(ragged, "takes", lambda q: True)
    monkeypatch.setattr(ragged, "_varlen", lambda: noted)
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
def test_it_is_masked_attention(pattern: str, queries: int, packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS[pattern]()
    leaves = [draw(3, 2, n, width, seed=i) for i, (n, width) in enumerate([(queries, 6), (11, 6), (11, 4)])]
    results = []
    for kernel in (sdpa, reference):
        out = kernel(*leaves, mask=masks.Padding(there))
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    assert packed == [(33, 2, 6)]


def test_hidden_keys_are_inert(packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS["anywhere"]()
    q, k, v = (draw(3, 2, 11, 4, seed=i).detach() for i in range(3))
    wanted = sdpa(q, k, v, mask=masks.Padding(there))
    k, v = (x.masked_fill(~there[:, None, :, None], torch.nan) for x in (k, v))
    torch.testing.assert_close(sdpa(q, k, v, mask=masks.Padding(there)), wanted, rtol=0.0, atol=0.0)


def test_masks_that_say_more_are_not_packed(packed: list[tuple[int, ...]]) -> None:
    there = PATTERNS["anywhere"]()
    q, k, v = (draw(3, 2, 11, 4, seed=i).detach() for i in range(3))
    for mask in (masks.and_(masks.Padding(there), masks.Causal()), there[:, None, :, None] & there[:, None, None, :]):
        assert ragged.present(mask) is None
        torch.testing.assert_close(sdpa(q, k, v, mask=mask), reference(q, k, v, mask=mask))
    both = masks.and_(masks.Padding(there), masks.Padding(there.flip(1)))
    assert torch.equal(ragged.present(both), there & there.flip(1))
    assert packed == []


def test_dropout_is_not_packed(packed: list[tuple[int, ...]]) -> None:
    q, k, v = (draw(3, 2, 11, 4, seed=i).detach() for i in range(3))
    sdpa(q, k, v, mask=masks.Padding(PATTERNS["anywhere"]()), dropout=0.5)
    assert packed == []


def test_the_gradient_of_a_reordering_goes_back_in_place() -> None:
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    x = draw(7, 2, 3, seed=0)
    assert torch.autograd.gradcheck(lambda x: ragged._Reordered.apply(x, order), x)
    assert torch.autograd.gradgradcheck(lambda x: ragged._Reordered.apply(x, order), x)


def test_on_a_cpu_masks_stay_masks() -> None:
    assert not ragged.takes(torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16))
