"""A different input for each read."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import Encoder, positions
from perceiver_core.adapters import Audio, Image, OneHotLabel, PerRead


def both():
    image = Image(3, positions=positions.Fourier(num_axes=2, num_bands=2, max_resolution=7))
    return PerRead([image, Audio(patch_size=5, positions=positions.Fourier(num_axes=1, num_bands=3, max_resolution=7))])


def test_each_input_goes_to_its_adapter():
    adapter = both()
    pictures, sound = torch.rand(2, 3, 7, 5), torch.rand(2, 23)
    tokens = adapter((pictures, sound))
    assert adapter.dim == (3 + 2 + 8, 5 + 1 + 6)
    for own, given, expected in zip(adapter.adapters, (pictures, sound), tokens, strict=True):
        torch.testing.assert_close(own(given).materialize(), expected.materialize(), rtol=0, atol=0)


def test_each_mask_goes_to_its_adapter():
    mask = torch.rand(2, 7, 5) < 0.5
    mask[:, 0, 0] = True
    pictures, sound = both()((torch.rand(2, 3, 7, 5), torch.rand(2, 23)), mask=[mask, None])
    assert pictures.mask is mask
    assert sound.mask is None


def test_adapters_without_a_mask_argument():
    adapter = PerRead([OneHotLabel(5), Audio(patch_size=5, positions=None)])
    label, audio = torch.tensor([3, 1]), torch.rand(2, 25)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tokens = adapter((label, audio), mask=[None, mask])
    torch.testing.assert_close(tokens[0].content, OneHotLabel(5)(label).content, rtol=0, atol=0)
    assert tokens[1].mask is mask


def test_an_encoder_reads_one_input_per_read():
    adapter = both()
    encoder = Encoder(adapter.dim, num_latents=5, dim=14, num_reads=2, depth=1, num_heads=7, share=False)
    inputs = torch.rand(2, 3, 7, 5), torch.rand(2, 23)
    out = encoder(adapter(inputs))
    for changed in (0, 1):
        others = [x * 0.5 if i == changed else x for i, x in enumerate(inputs)]
        assert (encoder(adapter(others)) - out).abs().max() > 1e-4


@pytest.mark.refusal
def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="inputs must be 2, one per adapter; got 1"):
        both()((torch.rand(2, 3, 7, 5),))
    with pytest.raises(ValueError, match="mask must be 2, one per adapter; got 1"):
        both()((torch.rand(2, 3, 7, 5), torch.rand(2, 23)), mask=[None])
