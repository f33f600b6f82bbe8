"""Rotary positions: rotations preserve norms, and scores depend on distances only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perceiver_core.positions import Rotary, half_open_exponents, inclusive_exponents

B, H, N, D, TURNED = 2, 3, 11, 13, 6

laws = settings(max_examples=30, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 2**16)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complex_rotary(heads: Tensor, positions: Tensor, dim: int, base: float) -> Tensor:
    """Neighboring channels are one complex number, multiplied by exp(i position theta)."""
    numbers = torch.complex(heads[..., 0:dim:2], heads[..., 1:dim:2])
    theta = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    turned = numbers * torch.exp(1j * positions[:, None, :, None] * theta)
    return torch.cat([torch.view_as_real(turned).flatten(-2), heads[..., dim:]], dim=-1)


@pytest.mark.parametrize("base", [10_000.0, 100.0])
@pytest.mark.parametrize("dim", [2, TURNED, 12])
def test_it_equals_a_product_of_complex_numbers(dim: int, base: float) -> None:
    heads = draw(B, H, N, D)
    from_the_end = torch.arange(-N + 1, 1, dtype=torch.float64)[None]
    expected = complex_rotary(heads, from_the_end, dim, base)
    torch.testing.assert_close(Rotary(dim, base=base)(heads), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, B])
def test_explicit_positions(samples: int) -> None:
    heads, where = draw(B, H, N, D), 20 * draw(samples, N, seed=1)
    actual = Rotary(TURNED)(heads, where)
    torch.testing.assert_close(actual, complex_rotary(heads, where, TURNED, 10_000.0), rtol=0.0, atol=1e-12)
    whole = torch.arange(N).flip(0).expand(samples, N)  # integers, in any order
    actual = Rotary(TURNED)(heads, whole)
    torch.testing.assert_close(actual, complex_rotary(heads, whole, TURNED, 10_000.0), rtol=0.0, atol=1e-12)


@laws
@given(seed=seeds, shift=st.integers(-1000, 1000))
def test_scores_depend_on_distance_only(seed: int, shift: int) -> None:
    rotary = Rotary(TURNED)
    q, k = draw(B, H, 5, D, seed=seed), draw(B, H, 7, D, seed=seed + 1)
    at_q, at_k = 10 * draw(B, 5, seed=seed + 2), 10 * draw(B, 7, seed=seed + 3)
    scores = rotary(q, at_q) @ rotary(k, at_k).mT
    moved = rotary(q, at_q + shift) @ rotary(k, at_k + shift).mT
    torch.testing.assert_close(moved, scores, rtol=0.0, atol=1e-10)


def test_scores_depend_on_distance() -> None:
    rotary, x = Rotary(TURNED), draw(1, 1, 1, D)
    scores = [(x @ rotary(x, torch.tensor([[d]])).mT).item() for d in (0.0, 1.0, 2.0)]
    assert scores[0] > scores[1] and scores[0] > scores[2]  # a vector has the largest product with itself at distance 0


@laws
@given(seed=seeds)
def test_norms_are_preserved(seed: int) -> None:
    heads = draw(B, H, N, D, seed=seed)
    turned = Rotary(TURNED)(heads)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1), rtol=0.0, atol=1e-12)


def test_fewer_queries_than_keys_are_aligned_at_the_end() -> None:
    rotary, heads = Rotary(TURNED), draw(B, H, N, D)
    torch.testing.assert_close(rotary(heads[:, :, -4:]), rotary(heads)[:, :, -4:], rtol=0.0, atol=1e-12)
    assert torch.equal(rotary(heads)[:, :, -1], heads[:, :, -1])  # the last is at 0
    assert not torch.isclose(rotary(heads)[:, :, 0, :TURNED], heads[:, :, 0, :TURNED]).any()


def test_channels_beyond_dim_are_unchanged() -> None:
    heads = draw(B, H, N, D)
    turned = Rotary(TURNED)(heads)
    assert turned.shape == heads.shape
    assert torch.equal(turned[..., TURNED:], heads[..., TURNED:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rotated_in_float32_and_rounded(dtype: torch.dtype) -> None:
    heads = draw(B, H, 1009, D).to(dtype)
    turned = Rotary(TURNED)(heads)
    assert turned.dtype == dtype
    assert torch.equal(turned, Rotary(TURNED)(heads.float()).to(dtype))
    expected = Rotary(TURNED)(heads.float())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(Rotary(TURNED)(heads.float()), expected)


def test_gradients_are_rotated_back() -> None:
    heads = draw(1, 2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(Rotary(4), heads)


def test_it_has_no_state() -> None:
    assert not Rotary(4).state_dict()


@pytest.mark.refusal
def test_odd_and_empty_widths_raise() -> None:
    with pytest.raises(ValueError, match="dim must be even, since channels are rotated in pairs; got 7"):
        Rotary(7)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        Rotary(0)


@pytest.mark.refusal
def test_heads_narrower_than_dim_raise() -> None:
    with pytest.raises(ValueError, match="heads must be at least dim=8 wide; got 6"):
        Rotary(8)(draw(B, H, N, 6))


def test_positions_per_sample_equal_a_loop() -> None:
    rotary, heads = Rotary(dim=4), torch.randn(2, 3, 7, 6)
    where = torch.tensor([0, 2, 3, 5, 7, 11, 13])
    torch.testing.assert_close(rotary(heads, where), rotary(heads, where.expand(2, 7)))


@pytest.mark.refusal
@pytest.mark.parametrize("shape", [(), (6,), (2, 6), (2, 1, 7)])
def test_positions_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positions must be n or b n with n=7"):
        Rotary(dim=4)(torch.randn(2, 3, 7, 6), torch.zeros(shape))


def perceiver_ar_rotary(heads: Tensor, where: Tensor, longest: float) -> Tensor:
    """Cosines and sines repeated for both channels of a pair, wavelengths from 1 to the longest, both included."""
    width = heads.shape[-1]
    bands = width // 2
    waves = longest ** ((2 / width) * torch.linspace(0, bands, bands, dtype=torch.float64))
    radians = where[:, None] * (1 / waves).repeat_interleave(2)
    crossed = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
    return heads * radians.cos() + crossed * radians.sin()


@pytest.mark.parametrize("dim", [2, TURNED, 12])
def test_inclusive_exponents_equal_the_perceiver_ar_code(dim: int) -> None:
    heads, where = draw(B, H, N, D), torch.arange(N, dtype=torch.float64)
    wanted = torch.cat([perceiver_ar_rotary(heads[..., :dim], where, 97.0), heads[..., dim:]], -1)
    rotary = Rotary(dim, base=97.0, exponents=inclusive_exponents)
    torch.testing.assert_close(rotary(heads, where), wanted, rtol=0.0, atol=1e-12)
    assert (rotary(heads, where) - Rotary(dim, base=97.0)(heads, where)).abs().max() > 1e-3 or dim == 2


def test_user_defined_exponents_and_their_ends() -> None:
    like = torch.zeros((), dtype=torch.float64)
    assert half_open_exponents(1, like).tolist() == inclusive_exponents(1, like).tolist() == [0.0]
    assert inclusive_exponents(7, like).tolist()[-1] == 1.0 and half_open_exponents(7, like)[-1] < 1.0
    assert inclusive_exponents(7, like).dtype == torch.float64
    still = Rotary(TURNED, exponents=lambda pairs, like: torch.full((pairs,), torch.inf, dtype=like.dtype))
    assert torch.equal(still(draw(B, H, N, D)), draw(B, H, N, D))


def test_all_channels_are_rotated_by_default() -> None:
    heads = draw(B, H, N, 12)
    assert torch.equal(Rotary()(heads), Rotary(12)(heads))


@pytest.mark.parametrize("rotary", [Rotary(TURNED), Rotary(TURNED, base=97.0, exponents=inclusive_exponents)])
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, N), (4, N), (N, N)])
def test_queries_aligned_at_the_end_have_the_right_distances(rotary: Rotary, queries: int, keys: int) -> None:
    x = draw(B, H, keys, D)
    scores = rotary(x[:, :, keys - queries :]) @ rotary(x).mT
    where = torch.arange(100, 100 + keys)
    wanted = rotary(x[:, :, keys - queries :], where[keys - queries :]) @ rotary(x, where).mT
    torch.testing.assert_close(scores, wanted, rtol=0.0, atol=1e-12)
    longer = torch.cat([draw(B, H, 5, D, seed=1), x], 2)  # padding on the left
    padded = (rotary(longer[:, :, -queries:]) @ rotary(longer).mT)[..., 5:]
    torch.testing.assert_close(padded, scores, rtol=0.0, atol=1e-12)


@pytest.mark.refusal
def test_odd_heads_and_invalid_bases_raise() -> None:
    with pytest.raises(
        ValueError, match=r"heads must have an even width, since channels are rotated in pairs; got 13\. Give"
    ):
        Rotary()(draw(B, H, N, D))
    with pytest.raises(ValueError, match=r"base must be at least 1e-20; got 0\.0"):
        Rotary(4, base=0.0)
