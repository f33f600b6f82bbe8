"""Log-mel spectrograms: dtypes, masks, settings that are refused, and what is saved. Values: ecosystem/test_librosa."""

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, positions
from perceiver_core.registry import from_config, to_config


def log_mel(**options):
    return adapters.LogMel(8000, **{"positions": None, "num_mels": 6, "n_fft": 32, "hop_length": 16, **options})


@pytest.mark.parametrize("samples", [1, 15, 16, 17, 160])
@pytest.mark.parametrize("n_fft", [32, 31])
def test_a_frame_every_hop_centered_on_its_sample(samples, n_fft):
    adapter = log_mel(n_fft=n_fft)
    tokens = adapter(torch.randn(2, samples))
    assert tokens.grid == ((samples - n_fft % 2) // 16 + 1,) == (adapter.num_tokens(samples, 0),)
    assert tokens.dim == adapter.dim == 6


def test_silence_has_the_logarithm_of_the_floor():
    content = log_mel(floor=1e-3)(torch.zeros(1, 100)).content
    torch.testing.assert_close(content, torch.full_like(content, 1e-3).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_spectrum_is_computed_in_float32_or_wider(dtype):
    waveform = torch.randn(2, 100).to(dtype)
    content = log_mel()(waveform).content
    assert content.dtype == dtype
    assert torch.equal(content, log_mel()(waveform.to(torch.promote_types(dtype, torch.float32))).content.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel()(waveform.float()).content, log_mel()(waveform.float()).content)


def test_gradients_reach_the_waveform():
    waveform = torch.randn(2, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: log_mel()(x).content, waveform)


def test_masks_count_tokens():
    valid = log_mel(tokens_per_frame=3).token_mask([40, 16], [48])
    assert valid.shape == (2, 3, 4)
    assert valid[:, 0].tolist() == [[True, True, True, False], [True, True, False, False]]
    assert log_mel().token_mask([40, 16], [48]).tolist() == valid[:, 0].tolist()


def test_settings_are_saved(tmp_path):
    adapter = log_mel(
        frequencies=adapters.htk_frequencies,
        window=adapters.hann_window,
        win_length=20,
        f_min=10,
        f_max=3000.0,
        area_norm=False,
        positions=positions.FixedGrid(positions.Fourier(1, 3), (9,)),
    )
    encoder = pc.Encoder(adapter.dim, num_latents=3, dim=16, depth=1, num_heads=2)
    model = pc.Perceiver(adapter, encoder, pc.heads.Classification(16, num_classes=5)).eval()
    pc.save(model, tmp_path / "model")
    waveform = torch.randn(2, 100)
    assert torch.equal(pc.load(tmp_path / "model").eval()(waveform), model(waveform))
    assert to_config(from_config(to_config(adapter))) == to_config(adapter)
    assert not list(nn.Module.buffers(adapter))  # nothing that a meta device or bfloat16 would lose


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mels": 0}, "num_mels must be a whole number of at least 1; got 0"),
        ({"tokens_per_frame": 4}, "tokens_per_frame must divide num_mels=6; got 4"),
        ({"win_length": 33}, "win_length must be at most 32; got 33"),
        ({"f_min": 4000.0}, "f_min and f_max must satisfy 0 <= f_min < f_max <= 4000.0"),
        ({"f_max": 4001.0}, "got 0.0 and 4001.0"),
        ({"floor": 0.0}, "floor must be at least 1.2e-38, the smallest float32 number; got 0.0"),
        ({"floor": float("nan")}, "floor must be (a finite number|at least .*); got nan"),
        ({"positions": positions.Fourier(2)}, "positions of LogMel must have 1 axes; got 2"),
        ({"positions": positions.Fourier(1), "tokens_per_frame": 6}, "positions of LogMel must have 2 axes; got 1"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        log_mel(**options)


@pytest.mark.refusal
def test_stereo_is_refused():
    with pytest.raises(ValueError, match=r"waveform must have 2 axes \(b s\)"):
        log_mel()(torch.randn(2, 2, 100))
