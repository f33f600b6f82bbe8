"""Pairs of frames: the patches around every pixel, their order, the projection, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.adapters import FramePair


def frames(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("patch", "channels"), [(1, 1), (3, 3), (5, 2), (7, 1)])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (1, 11)])
def test_a_patch_is_its_pixels_row_by_row_with_channels_together(patch, channels, height, width):
    pair, both = (
        FramePair(positions=None, num_channels=channels, patch_size=patch),
        frames(2, 2, channels, height, width),
    )
    around = F.pad(both, [patch // 2] * 4)
    actual = pair.patches(both)
    assert actual.shape == (2, height, width, 2 * patch * patch * channels)
    for i, j in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
        block = around[..., i : i + patch, j : j + patch]  # b t c p q
        torch.testing.assert_close(actual[:, i, j], block.movedim(2, -1).flatten(1), rtol=0, atol=0)


def test_tokens_are_patches_projected_and_positions():
    where = pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=(5, 7))
    pair, both = FramePair(positions=where, dim=11).double(), frames(2, 2, 3, 5, 7)
    tokens = pair(both)
    assert tokens.grid == (5, 7) and tokens.dim == pair.dim == 11 + where.dim
    torch.testing.assert_close(tokens.content, F.linear(pair.patches(both), pair.project.weight, pair.project.bias))
    mask = torch.rand(2, 5, 7) < 0.5
    mask[:, 0, 0] = True
    assert torch.equal(pair(both, mask=mask).mask, mask)


def test_the_two_frames_are_distinguished():
    pair, both = FramePair(positions=None).double(), frames(1, 2, 3, 5, 7)
    assert (pair(both).content - pair(both.flip(1)).content).abs().max() > 1e-3


def test_gradients():
    pair, both = FramePair(positions=None, num_channels=1, dim=3).double(), frames(1, 2, 1, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pair(x).materialize(), both)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (torch.zeros(1, 3, 3, 5, 7), ValueError, "frames must be two, b 2 c h w"),
        (torch.zeros(1, 2, 5, 7, 3), ValueError, "frames must have 3 channels in axis 2; got 5"),
        (torch.zeros(2, 3, 5, 7), ValueError, r"frames must have 5 axes"),
        (torch.zeros(1, 2, 3, 5, 7).byte(), TypeError, "frames must be floating point"),
        (torch.full((1, 2, 3, 5, 7), torch.inf), ValueError, "frames holds NaN or infinite"),
    ],
)
def test_invalid_frames_raise(given, kind, message):
    with pytest.raises(kind, match=message):
        FramePair(positions=None)(given)


@pytest.mark.refusal
def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="patch_size must be odd, to have a pixel in its middle; got 4"):
        FramePair(positions=None, patch_size=4)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        FramePair(positions=None, dim=0)
    with pytest.raises(ValueError, match="positions of FramePair must have 2 axes; got 3"):
        FramePair(positions=pc.positions.Fourier(num_axes=3, num_bands=2, max_resolution=7))
