"""Audio: patches of samples with a padded remainder, and spectrograms."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import adapters, positions
from perceiver_core.adapters import Audio, Spectrogram


def where(axes):
    return positions.Fourier(num_axes=axes, num_bands=3, max_resolution=17)


@pytest.mark.parametrize("samples", [1, 6, 7, 8, 77, 83])
def test_every_patch_is_a_token_and_the_last_is_padded_with_zeros(samples):
    audio = Audio(patch_size=7, positions=where(1))
    sound = torch.rand(2, samples) + 1
    tokens = audio(sound)
    n = -(-samples // 7)
    assert tokens.grid == (n,)
    flat = tokens.content.flatten(1)
    torch.testing.assert_close(flat[:, :samples], sound, rtol=0, atol=0)
    assert flat[:, samples:].eq(0).all()
    points = torch.linspace(-1, 1, n)[:, None]
    torch.testing.assert_close(tokens.positions(), where(1)(points), rtol=1e-5, atol=1e-5)
    assert tokens.materialize().shape == (2, n, audio.dim)


def test_any_length_after_any_other():
    audio = Audio(patch_size=7, positions=where(1))
    sound = torch.rand(2, 23)
    before = audio(sound).materialize()
    audio(torch.rand(1, 997))
    torch.testing.assert_close(audio(sound).materialize(), before, rtol=0, atol=0)


def test_large_values_are_not_infinite():
    samples = torch.full((2, 21), torch.finfo(torch.float32).max)
    assert Audio(patch_size=7, positions=where(1))(samples).num_tokens == 3


def test_the_mask_is_over_patches():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    sound = torch.rand(2, 20)
    sound[0, 14:] = torch.nan
    dense = Audio(patch_size=7, positions=None)(sound, mask=mask).materialize()
    assert dense.isfinite().all()
    assert dense[~mask].eq(0).all()


def test_audio_without_positions_is_its_patches():
    audio = Audio(patch_size=5, positions=None)
    assert audio.dim == 5
    assert audio(torch.rand(2, 11)).materialize().shape == (2, 3, 5)


@pytest.mark.parametrize("bins, frames", [(11, 7), (3, 29)])
def test_every_value_of_a_spectrogram_is_a_token(bins, frames):
    adapter = Spectrogram(positions=where(2))
    values = torch.randn(2, bins, frames)
    tokens = adapter(values)
    assert tokens.grid == (bins, frames)
    torch.testing.assert_close(tokens.content[..., 0], values, rtol=0, atol=0)
    points = positions.grid_points((bins, frames), like=values)
    torch.testing.assert_close(tokens.positions(), where(2)(points), rtol=1e-5, atol=1e-5)
    assert tokens.dim == adapter.dim == 1 + where(2).dim


def test_a_spectrogram_with_a_mask():
    values = torch.randn(2, 3, 5)
    mask = torch.rand(2, 3, 5) < 0.5
    mask[:, 0, 0] = True
    tokens = Spectrogram(positions=None)(values.masked_fill(~mask, torch.inf), mask=mask)
    torch.testing.assert_close(tokens.materialize()[..., 0], (values * mask).flatten(1), rtol=0, atol=0)


def test_stereo_is_two_channels_side_by_side() -> None:
    stereo = adapters.Audio(patch_size=5, positions=None, num_channels=2)
    samples = torch.rand(3, 2, 23)
    content = stereo(samples).content
    assert content.shape == (3, 5, stereo.dim) == (3, 5, 10)
    torch.testing.assert_close(content[1, 2].view(5, 2), samples[1, :, 10:15].T)
    assert content[:, -1, 6:].abs().max() == 0  # the remainder is padded
    mono = adapters.Audio(patch_size=5, positions=None)
    torch.testing.assert_close(mono(samples[:, 0]).content, mono(samples[:, :1]).content)
    with pytest.raises(ValueError, match="waveform must have 2 channels in axis 1; got 1"):
        stereo(samples[:, :1])
