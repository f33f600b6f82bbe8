"""The kernel of PyTorch: widths, alignment of causal masks, autocast, and which fused kernel runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from perceiver_core import masks
from perceiver_core.kernels import sdpa
from perceiver_core.kernels.sdpa import fused_width
from tests.kernels.cases import (
    MASKS,
    B,
    H,
    Q,
    check,
    exact,
    qkv,
)


def test_autocast_sets_the_dtype_except_for_float64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sdpa(*(x.float() for x in qkv())).dtype == torch.bfloat16
        assert sdpa(*qkv()).dtype == torch.float64


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
def test_padding_the_widths_has_no_effect(d: int, e: int) -> None:
    for mask, allowed in (MASKS["none"], MASKS["and"]):
        check(sdpa, qkv(d=d, e=e), mask, allowed, 1e-10)
        assert sdpa(*qkv(d=d, e=e), mask=mask).shape == (B, H, Q, e)


@pytest.mark.parametrize(("q", "k", "is_causal"), [(7, 7, True), (5, 7, False), (7, 5, False)])
def test_is_causal_is_used_only_for_equal_lengths(
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
def test_unequal_widths_and_masks_run_the_fused_kernel(name: str) -> None:
    inputs = [x.float() for x in qkv()]
    with profile(activities=[ProfilerActivity.CPU]) as events:
        sdpa(*inputs, mask=MASKS[name][0])
    names = {event.name for event in events.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names
