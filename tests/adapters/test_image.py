"""Images: every stem, any size, any number of channels, never square."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import adapters, positions
from perceiver_core.adapters import ConvStem, Image, Patches, Pixels, Project

STEMS = {
    "pixels": (Pixels, lambda h, w: (h, w)),
    "project": (partial(Project, dim=5), lambda h, w: (h, w)),
    "patches": (partial(Patches, patch_size=3), lambda h, w: (math.ceil(h / 3), math.ceil(w / 3))),
    "flat patches": (partial(Patches, patch_size=(2, 5)), lambda h, w: (math.ceil(h / 2), math.ceil(w / 5))),
    "convolution": (partial(ConvStem, dim=7), lambda h, w: (math.ceil(h / 4), math.ceil(w / 4))),
}
each_stem = pytest.mark.parametrize("stem, grid", STEMS.values(), ids=STEMS.keys())


def where():
    return positions.Fourier(num_axes=2, num_bands=3, max_resolution=(13, 29))


@each_stem
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(11, 23), (23, 11), (1, 2)])
def test_tokens_are_the_stem_output_with_positions(stem, grid, channels, size):
    image = Image(channels, positions=where(), stem=stem).eval()
    pictures = torch.rand(2, channels, *size)
    tokens = image(pictures)
    assert tokens.grid == grid(*size)
    assert tokens.materialize().shape == (2, math.prod(grid(*size)), image.dim)
    torch.testing.assert_close(tokens.content, image.stem(pictures).permute(0, 2, 3, 1), rtol=0, atol=0)
    points = positions.grid_points(tokens.grid, like=pictures)
    torch.testing.assert_close(tokens.positions(), where()(points), rtol=1e-5, atol=1e-5)


@each_stem
def test_the_output_does_not_depend_on_earlier_images(stem, grid):
    image = Image(3, positions=where(), stem=stem).eval()
    small, large = torch.rand(2, 3, 7, 5), torch.rand(1, 3, 19, 31)
    before = image(small).materialize()
    image(large)
    torch.testing.assert_close(image(small).materialize(), before, rtol=0, atol=0)


def test_without_positions():
    image = Image(3, positions=None)
    pictures = torch.rand(2, 3, 7, 5)
    assert image.dim == 3
    torch.testing.assert_close(image(pictures).materialize(), pictures.flatten(2).mT, rtol=0, atol=0)


def test_learned_positions_follow_the_size():
    image = Image(1, positions=positions.LearnedGrid((7, 5), dim=2))
    torch.testing.assert_close(image(torch.rand(1, 1, 7, 5)).positions(), image.positions.vectors, rtol=0, atol=0)
    assert image(torch.rand(1, 1, 3, 11)).materialize().shape == (1, 33, 3)


def test_a_user_defined_stem():
    class Half(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.dim = channels

        def forward(self, x):
            return F.avg_pool2d(x, 2)

    image = Image(3, positions=where(), stem=Half)
    assert image(torch.rand(2, 3, 8, 6)).grid == (4, 3)
    assert image.dim == 3 + where().dim


@each_stem
def test_the_mask_is_over_tokens(stem, grid):
    image = Image(1, positions=where(), stem=stem)
    mask = torch.rand(2, *grid(11, 23)) < 0.7
    tokens = image(torch.rand(2, 1, 11, 23), mask=mask)
    assert (tokens.flat_mask() == mask.flatten(1)).all()


@pytest.mark.parametrize("stem", [Pixels, partial(Project, dim=5)], ids=["pixels", "project"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_masked_pixels_affect_neither_tokens_nor_gradients(stem, value):
    torch.manual_seed(0)
    image = Image(3, positions=None, stem=stem)
    mask = torch.rand(2, 7, 5) < 0.7
    clean = torch.rand(2, 3, 7, 5)
    tokens, gradients = [], []
    for pictures in (clean, clean.masked_fill(~mask[:, None], value)):
        tokens.append(image(pictures, mask=mask).materialize())
        loss = tokens[-1].square().sum()
        gradients.append(torch.autograd.grad(loss, list(image.parameters())) if loss.requires_grad else ())
    torch.testing.assert_close(*tokens, rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.refusal
@pytest.mark.parametrize("positions", [pc.positions.Fourier, pc.positions.Rotary(8), "fourier"])
def test_objects_other_than_positions_raise(positions: object) -> None:
    with pytest.raises(TypeError, match=r"with dim, num_axes and tables, such as positions.Fourier\(num_axes=2\)"):
        adapters.Image(num_channels=3, positions=positions)
