"""Distributions of new weights, measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from perceiver_core.layers import init


def largest_gap(sample: Tensor, std: float) -> float:
    """Kolmogorov distance of a sample from a normal of `std`, truncated at two standard deviations."""
    x = sample.detach().flatten().double().sort().values / std
    inside = math.erf(2**0.5)
    cdf = (torch.erf(x / 2**0.5) / inside + 1) / 2
    steps = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
    return float((cdf - steps).abs().max())


def test_the_measure_distinguishes_a_truncated_normal() -> None:
    torch.manual_seed(0)
    n = 100_003
    assert largest_gap(nn.init.trunc_normal_(torch.empty(n), std=3.0, a=-6.0, b=6.0), 3.0) < 1.9 / n**0.5
    assert largest_gap(torch.randn(n), 1.0) > 1.9 / n**0.5
    assert largest_gap(torch.rand(n) * 4 - 2, 1.0) > 1.9 / n**0.5


def test_the_standard_deviation_of_a_truncated_normal() -> None:
    """1 - 2 a phi(a) / (Phi(a) - Phi(-a)) is its variance, at a = 2."""
    density = math.exp(-2.0) / math.sqrt(2 * math.pi)
    assert math.isclose(init.TRUNCATED_STD, math.sqrt(1 - 4 * density / math.erf(2**0.5)), rel_tol=1e-12)


@pytest.mark.parametrize(("fan_in", "out"), [(401, 307), (31, 1009)])
def test_linear_has_variance_one_over_fan_in_and_no_bias(fan_in: int, out: int) -> None:
    torch.manual_seed(0)
    layer = init.linear(fan_in, out)
    n = layer.weight.numel()
    assert layer.weight.shape == (out, fan_in)
    assert abs(layer.weight.std().item() * fan_in**0.5 - 1) < 5 / (2 * n) ** 0.5
    assert abs(layer.weight.mean().item() * fan_in**0.5) < 5 / n**0.5
    std = fan_in**-0.5 / init.TRUNCATED_STD
    assert layer.weight.abs().max() <= 2 * std
    assert largest_gap(layer.weight, std) < 1.9 / n**0.5
    assert torch.equal(layer.bias, torch.zeros(out))


def test_linear_without_bias() -> None:
    assert init.linear(5, 7, bias=False).bias is None


def test_linear_keeps_the_size_of_its_input() -> None:
    torch.manual_seed(0)
    out = init.linear(509, 499)(torch.randn(211, 509))
    assert abs(out.std().item() - 1) < 0.02


def test_fan_in_fills_in_place_and_accepts_a_fan() -> None:
    torch.manual_seed(0)
    weight = torch.empty(101, 7, 5, 3)
    assert init.fan_in_(weight, 7 * 5 * 3) is weight
    assert abs(weight.std().item() * 105**0.5 - 1) < 5 / (2 * weight.numel()) ** 0.5


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_embedding_is_a_normal_truncated_at_two_standard_deviations(std: float) -> None:
    torch.manual_seed(0)
    array = init.embedding(503, 211, std=std)
    assert isinstance(array, nn.Parameter) and array.requires_grad
    assert array.shape == (503, 211)
    assert array.abs().max() <= 2 * std
    assert largest_gap(array, std) < 1.9 / array.numel() ** 0.5
    assert abs(array.std().item() / (std * init.TRUNCATED_STD) - 1) < 5 / (2 * array.numel()) ** 0.5


def test_embedding_has_std_0_02_by_default() -> None:
    torch.manual_seed(0)
    assert 0.039 < init.embedding(503, 211).abs().max() <= 0.04


def test_initialization_is_seeded() -> None:
    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return init.linear(5, 7).weight, init.embedding(3, 11)

    for first, again, other in zip(drawn(0), drawn(0), drawn(1), strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)
