"""Perceiver: adapter, encoder and head in order; errors at construction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import Encoder, Perceiver, adapters, heads, positions


def perceiver(head=None):
    torch.manual_seed(0)
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=2, max_resolution=7))
    encoder = Encoder(image.dim, num_latents=5, dim=14, num_reads=2, depth=1, num_heads=7)
    return Perceiver(image, encoder, head or heads.Classification(encoder.dim, 11))


@pytest.mark.parametrize(
    "head, shape",
    [(heads.Classification(14, 11), (2, 11)), (heads.Regression(14, 3), (2, 3)), (heads.Identity(), (2, 5, 14))],
)
def test_the_parts_run_in_order(head, shape):
    model = perceiver(head)
    images = torch.rand(2, 3, 7, 5)
    mask = torch.rand(2, 7, 5) < 0.6
    for options in ({}, {"mask": mask}):
        out = model(images, **options)
        expected = model.head(model.encoder(model.adapter(images, **options)))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert out.shape == shape
    assert not torch.allclose(model(images), model(images, mask=mask), atol=1e-5)


def test_plain_tensors_need_no_adapter():
    whole = perceiver()
    model = Perceiver(nn.Identity(), whole.encoder, whole.head)
    images = torch.rand(2, 3, 7, 5)
    torch.testing.assert_close(model(whole.adapter(images).materialize()), whole(images), rtol=0, atol=1e-6)


def test_a_user_defined_adapter_needs_no_mask_argument():
    class Flat(nn.Module):
        dim = 3

        def forward(self, images):
            return images.flatten(2).mT

    model = Perceiver(Flat(), Encoder(3, num_latents=5, dim=14, depth=1, num_heads=7), heads.Regression(14))
    assert model(torch.rand(2, 3, 7, 5)).shape == (2, 1)


def test_the_state_dict_is_that_of_its_parts():
    model = perceiver()
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"encoder", "head"}


@pytest.mark.refusal
def test_parts_of_different_widths_raise():
    whole = perceiver()
    with pytest.raises(ValueError, match="encoder must accept the output width of adapter, 1; got 13"):
        Perceiver(adapters.Grid(1, positions=None), whole.encoder, whole.head)
    with pytest.raises(ValueError, match="head must accept the output width of encoder, 14; got 13"):
        Perceiver(whole.adapter, whole.encoder, heads.Regression(13))
    with pytest.raises(TypeError, match="head must be a module; got the class Identity"):
        Perceiver(whole.adapter, whole.encoder, heads.Identity)


@pytest.mark.refusal
def test_parts_of_different_widths_raise_at_construction() -> None:
    grid, encoder = (
        pc.adapters.Grid(num_channels=7, positions=None),
        pc.Encoder(6, num_latents=5, dim=14, depth=1, num_heads=2),
    )
    with pytest.raises(ValueError, match="encoder must accept the output width of adapter, 7; got 6"):
        pc.Perceiver(grid, encoder, pc.heads.Identity())
    with pytest.raises(ValueError, match="head must accept the output width of encoder, 14; got 13"):
        pc.Perceiver(nn.Identity(), encoder, pc.heads.Regression(13))
    with pytest.raises(TypeError, match="head must be a module; got the class Identity"):
        pc.Perceiver(nn.Identity(), encoder, pc.heads.Identity)


def test_it_runs_on_the_meta_device() -> None:
    image = pc.adapters.Image(
        num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=16)
    )
    with torch.device("meta"):
        model = pc.Perceiver(
            image, pc.Encoder(image.dim, num_latents=5, dim=14, num_heads=2), pc.heads.Classification(14, 3)
        )
        assert model(torch.rand(2, 3, 7, 5)).shape == (2, 3)
