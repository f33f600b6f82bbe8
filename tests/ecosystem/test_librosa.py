"""`adapters.LogMel` equals the logarithm of librosa's mel spectrogram."""

import numpy as np
import pytest
import torch

from perceiver_core import adapters, positions

librosa = pytest.importorskip("librosa", reason="its dependency numba has no wheel for the newest Python and NumPy")

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.filterwarnings("ignore:n_fft=.* is too large for input signal:UserWarning"),
    pytest.mark.filterwarnings("ignore:Empty filters detected:UserWarning"),
]

FREQUENCIES = {False: adapters.slaney_frequencies, True: adapters.htk_frequencies}


@pytest.mark.parametrize("htk", [False, True])
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize(
    ("sr", "n_mels", "n_fft", "hop_length", "win_length", "fmin", "fmax"),
    [
        (8000, 40, 256, 80, None, 0, None),
        (16000, 80, 400, 160, None, 20, 7600),
        (22050, 128, 2048, 512, 1101, 0, 8000),
        (16000, 64, 511, 160, 400, 50, None),
        (44100, 20, 1024, 1024, 3, 0, 100),  # bands between two bins are empty
    ],
)
def test_spectrogram_equals_librosa(sr, n_mels, n_fft, hop_length, win_length, fmin, fmax, htk, norm):
    torch.manual_seed(0)
    adapter = adapters.LogMel(
        sr,
        positions=None,
        num_mels=n_mels,
        n_fft=n_fft,
        hop_length=hop_length,
        win_length=win_length,
        f_min=fmin,
        f_max=fmax,
        frequencies=FREQUENCIES[htk],
        area_norm=norm is not None,
        floor=1e-8,
    )
    mel = {"sr": sr, "n_fft": n_fft, "n_mels": n_mels, "fmin": fmin, "fmax": fmax, "htk": htk, "norm": norm}
    np.testing.assert_allclose(adapter.filters(), librosa.filters.mel(dtype=np.float64, **mel), atol=1e-12)
    for size in (1, 100, 4001):
        waveform = torch.randn(2, size, dtype=torch.float64)
        power = librosa.feature.melspectrogram(
            y=waveform.numpy(), hop_length=hop_length, win_length=win_length, dtype=np.float64, **mel
        )
        expected = np.log(np.maximum(power, 1e-8))
        np.testing.assert_allclose(adapter.frames(waveform).mT, expected, atol=1e-10)
        np.testing.assert_allclose(adapter.frames(waveform.float()).mT, expected, atol=1e-3)
        tokens = adapter(waveform)
        np.testing.assert_allclose(tokens.content, expected.swapaxes(1, 2), atol=1e-10)


def test_a_token_a_value_holds_bands_and_frames():
    waveform = torch.randn(2, 1000)
    fourier = positions.Fourier(2, num_bands=3, max_resolution=16)
    frames = adapters.LogMel(8000, positions=None, num_mels=12, n_fft=64, hop_length=50)
    values = adapters.LogMel(8000, positions=fourier, num_mels=12, n_fft=64, hop_length=50, tokens_per_frame=12)
    patches = adapters.LogMel(8000, positions=fourier, num_mels=12, n_fft=64, hop_length=50, tokens_per_frame=3)
    assert (values(waveform).grid, values.dim) == ((12, 21), 1 + fourier.dim)
    assert torch.equal(values(waveform).content[..., 0], frames(waveform).content.mT)
    assert (patches(waveform).grid, patches.dim) == ((3, 21), 4 + fourier.dim)
    assert torch.equal(patches(waveform).content[:, 1], frames(waveform).content[..., 4:8])
