"""Rounding errors of position features and losses are within theoretical bounds, which are not too loose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import positions
from tests.robustness.rounding import CONSTANT, smallest, unit
from tests.robustness.test_error_bounds import TIGHT, wide

pytestmark = pytest.mark.no_shape_checks  # shapes are checked by the tests of each part

HALF = (torch.bfloat16, torch.float16)
RESOLUTIONS = (16, 1024, 100_000)


def features(resolution: int) -> dict[str, nn.Module]:
    """Return modules whose highest angle is about pi / 2 * resolution for coordinates in [-1, 1]."""
    num_octaves = round(math.log2(resolution))
    torch.manual_seed(0)
    return {
        "Fourier": positions.Fourier(num_axes=2, num_bands=8, max_resolution=resolution),
        "FourierPerAxis": positions.FourierPerAxis(num_axes=2, num_bands=8, max_frequency=resolution),
        "NeRF": positions.NeRF(num_axes=2, num_bands=num_octaves),
        "Gaussian": positions.Gaussian(num_axes=2, num_features=8, scale=resolution / 16),
    }


def in_float64(module: nn.Module, points: Tensor) -> Tensor:
    return module.double()(points.double())


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("name", features(16))
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_errors_of_features_grow_with_the_frequency(name, resolution, dtype):
    """Rounding an angle of up to pi f has an error of up to u pi f, and the error of its sine is not larger.

    Modules in half precision compute in float32, so that only the result is rounded to 16 bits.
    """
    points = (torch.rand(997, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    module = features(resolution)[name].to(dtype)
    actual = module(points)
    assert actual.dtype == dtype
    angle = 2 * math.pi * resolution if name != "Gaussian" else 2 * math.pi * 2 * 4 * resolution / 16
    limit = unit(torch.float32) * (angle + CONSTANT) + (unit(dtype) if dtype in HALF else 0.0)
    ratio = float((actual.double() - in_float64(features(resolution)[name], points)).abs().max()) / limit
    assert TIGHT <= ratio <= 1, ratio


@pytest.mark.parametrize("name", ("Fourier", "FourierPerAxis", "NeRF"))
def test_errors_of_tables_grow_with_the_frequency(name):
    """Besides angles, the coordinates of the grid are rounded."""
    for resolution in RESOLUTIONS:
        like = torch.zeros((), dtype=torch.float32)
        actual = features(resolution)[name].tables((31, 997), like)
        expected = features(resolution)[name].double().tables((31, 997), like.double())
        limit = unit(torch.float32) * (2 * math.pi * resolution + CONSTANT)
        ratio = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True)) / limit
        assert TIGHT <= ratio <= 1, (resolution, ratio)


def test_bounds_reveal_frequencies_in_half_precision():
    points = torch.rand(997, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = positions.Gaussian(num_axes=2, num_features=8, scale=1.0)
    expected = in_float64(module, points)
    module.frequencies = module.frequencies.bfloat16().double()
    limit = unit(torch.float32) * (16 * math.pi + CONSTANT) + unit(torch.bfloat16)
    assert float((in_float64(module, points) - expected).abs().max()) > limit


def loss_inputs(name: str, dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs = (torch.randn(7, 997, generator=generator) * size).to(dtype)
    if name == "end_point_error":
        return outputs[:, :996].reshape(7, 498, 2), torch.randn(7, 498, 2, generator=generator).to(dtype) * size
    if name == "cross_entropy":
        return outputs, torch.randint(997, (7,), generator=generator)
    return outputs, torch.randint(2, outputs.shape, generator=generator).to(dtype)


@pytest.mark.parametrize("name", ("end_point_error", "cross_entropy", "binary_cross_entropy"))
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_errors_of_losses_do_not_grow_with_the_unit_roundoff_of_their_inputs(name, dtype):
    """Losses compute in float32: the error is at most u (c + log n) times the largest input, the loss and 1.

    PyTorch computes means by pairwise summation. Gradients are rounded to the dtype of the inputs.
    """
    loss, found, gradients = getattr(pc.losses, name), [], []
    for size in (0.01, 1.0, 300.0):
        outputs, targets = loss_inputs(name, dtype, size)
        actual, expected = outputs.clone().requires_grad_(), outputs.double().requires_grad_()
        value = loss(actual, targets)
        assert value.dtype == wide(dtype)
        correct = loss(expected, targets.double() if targets.is_floating_point() else targets)
        limit = (
            unit(wide(dtype))
            * (CONSTANT + math.log2(outputs.numel()))
            * float(1 + outputs.abs().max() + correct.detach())
        )
        found.append(float((value.detach() - correct.detach()).abs()) / limit)
        got, wanted = torch.autograd.grad(value, actual)[0], torch.autograd.grad(correct, expected)[0]
        largest = float(wanted.abs().max())
        limit = (unit(wide(dtype)) * CONSTANT * (1 + float(outputs.abs().max())) + unit(dtype)) * largest
        gradients.append(float((got.double() - wanted).abs().max()) / (limit + smallest(dtype)))
    assert TIGHT <= max(*found, *gradients) <= 1, (found, gradients)
