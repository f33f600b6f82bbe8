"""Adapter that computes log-mel spectrograms of waveforms, with mel scales and a window function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.adapters.grid import GridAdapter
from perceiver_core.adapters.lengths import Lengths, Size
from perceiver_core.argument_errors import checked
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

SMALLEST_RATE = 1e-20  # With a smaller sample rate, filters of equal area might overflow in float32.


@partial(register, name="adapters.slaney_frequencies")
@checked
def slaney_frequencies(f_min: float, f_max: float, count: int) -> Float[Tensor, " n"]:
    """Return `count` frequencies in Hz, from `f_min` to `f_max`, evenly spaced on Slaney's mel scale, in float64.

    The scale is linear below 1 kHz and logarithmic above. It is librosa's default.

    Example:
        >>> pc.adapters.slaney_frequencies(0, 6400, 4).round(decimals=1).tolist()
        [0.0, 933.3, 2444.3, 6400.0]

    Reference: Slaney 1998 (Auditory Toolbox); librosa, `mel_frequencies(htk=False)`.
    """
    _check_frequencies(f_min, f_max, count)
    low, high = (hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4) for hz in (f_min, f_max))
    mels = torch.linspace(low, high, count, dtype=torch.float64)
    return torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))


@partial(register, name="adapters.htk_frequencies")
@checked
def htk_frequencies(f_min: float, f_max: float, count: int) -> Float[Tensor, " n"]:
    """Return `count` frequencies in Hz, from `f_min` to `f_max`, evenly spaced on HTK's mel scale, in float64.

    A frequency of f Hz corresponds to 2595 log10(1 + f / 700) mel.

    Example:
        >>> pc.adapters.htk_frequencies(0, 6400, 4).round(decimals=1).tolist()
        [0.0, 815.3, 2580.0, 6400.0]

    Reference: Young et al. 2006 (The HTK Book), equation 5.13; librosa, `mel_frequencies(htk=True)`.
    """
    _check_frequencies(f_min, f_max, count)
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (f_min, f_max))
    return 700 * (10 ** (torch.linspace(low, high, count, dtype=torch.float64) / 2595) - 1)


def _check_frequencies(f_min: float, f_max: float, count: int) -> None:
    checks.positive(count=count)
    if min(f_min, f_max) < 0:
        raise ValueError(f"f_min and f_max must be at least 0; got {f_min} and {f_max}")


@partial(register, name="adapters.hann_window")
@checked
def hann_window(length: int) -> Float[Tensor, " n"]:
    """Return a periodic Hann window in float64.

    Example:
        >>> pc.adapters.hann_window(4).round(decimals=3).tolist()
        [0.0, 0.5, 1.0, 0.5]
    """
    checks.positive(length=length)
    return torch.hann_window(length, dtype=torch.float64)


@register
class LogMel(GridAdapter):
    """Adapter for waveforms `b s` that computes log-mel spectrograms: one token per frame, or one per value.

    The power spectrum of each frame is multiplied by triangular filters. The logarithm of the result is equal to
    `np.log(np.maximum(librosa.feature.melspectrogram(...), floor))`. As in librosa, frames are centered on the samples
    0, hop_length, 2 hop_length, ..., and the waveform is padded with zeros at both ends.

    Args:
        sample_rate: Sample rate in Hz.
        positions: Position encoding with one axis (frames), or two axes (bands, frames) if there are several tokens per
            frame; None for no position encoding. Use `positions.FixedGrid` for positions in units of frames.
        num_mels: Number of mel bands.
        n_fft: FFT size, the number of samples per frame.
        hop_length: Number of samples between frames.
        win_length: Window length; `n_fft` by default. Shorter windows are padded with zeros at both ends.
        tokens_per_frame: Number of tokens per frame, a divisor of `num_mels`: 1 for one token per frame, `num_mels` for
            one token per value. Each token consists of `num_mels / tokens_per_frame` adjacent bands.
        f_min: Lowest frequency in Hz.
        f_max: Highest frequency in Hz; half the sample rate by default.
        frequencies: Function `(f_min, f_max, count) -> frequencies` that returns the edge and center frequencies of the
            filters: `slaney_frequencies`, `htk_frequencies` or a custom function.
        area_norm: Whether all filters have the same area (`norm="slaney"` in librosa). If False, they all peak at 1.
        window: Function `length -> window`.
        floor: Lower bound of the power before the logarithm is taken.

    Raises:
        ValueError: If a size is below 1, or `tokens_per_frame` does not divide `num_mels`.
        ValueError: If `0 <= f_min < f_max <= sample_rate / 2` does not hold.
        ValueError: If the window is longer than the FFT, or `floor` is below the normal range of float32.

    Example:
        >>> positions = pc.positions.FixedGrid(pc.positions.Fourier(num_axes=1, num_bands=16), grid=(200,))
        >>> speech = pc.adapters.LogMel(8000, positions=positions, num_mels=40, n_fft=256, hop_length=80)
        >>> speech.dim, speech(torch.randn(2, 8000), lengths=[8000, 3000]).mask.sum(1).tolist()
        (73, [101, 38])

    Reference: McFee et al. 2015 (librosa), `feature.melspectrogram`; Gong et al. 2021 (AST), section 2.1.
    """

    def __init__(  # noqa: PLR0913 (settings of a spectrogram, as in librosa and torchaudio)
        self,
        sample_rate: float,
        *,
        positions: Positions | None,
        num_mels: int = 80,
        n_fft: int = 400,
        hop_length: int = 160,
        win_length: int | None = None,
        tokens_per_frame: int = 1,
        f_min: float = 0.0,
        f_max: float | None = None,
        frequencies: Callable[[float, float, int], Tensor] = slaney_frequencies,
        area_norm: bool = True,
        window: Callable[[int], Tensor] = hann_window,
        floor: float = 1e-6,
    ) -> None:
        win_length = n_fft if win_length is None else win_length
        checks.positive(num_mels=num_mels, n_fft=n_fft, hop_length=hop_length, tokens_per_frame=tokens_per_frame)
        checks.positive(at_most=n_fft, win_length=win_length)
        if num_mels % tokens_per_frame:
            raise ValueError(f"tokens_per_frame must divide num_mels={num_mels}; got {tokens_per_frame}")
        if not isinstance(sample_rate, (int, float)) or not SMALLEST_RATE <= sample_rate < math.inf:
            raise ValueError(f"sample_rate must be a number of at least {SMALLEST_RATE}, in Hz; got {sample_rate!r}")
        for name, function in (("frequencies", frequencies), ("window", window)):
            if not callable(function):
                raise TypeError(f"{name} must be a function such as adapters.htk_frequencies; got {function!r:.80}")
        f_max = sample_rate / 2 if f_max is None else f_max
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(
                f"f_min and f_max must satisfy 0 <= f_min < f_max <= {sample_rate / 2}, half the sample rate; "
                f"got {f_min} and {f_max}"
            )
        smallest = torch.finfo(torch.float32).tiny
        if not smallest <= floor < math.inf:
            raise ValueError(f"floor must be at least {smallest:.1e}, the smallest float32 number; got {floor!r}")
        super().__init__(num_mels // tokens_per_frame, positions, num_axes=1 if tokens_per_frame == 1 else 2)
        self.sample_rate, self.num_mels, self.tokens_per_frame = sample_rate, num_mels, tokens_per_frame
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length
        self.f_min, self.f_max, self.frequencies, self.area_norm = f_min, f_max, frequencies, area_norm
        self.window, self.floor = window, floor

    def num_tokens(self, length: Size, axis: int) -> Size:
        """Return the number of frames of a waveform with `length` samples."""
        return (length - self.n_fft % 2) // self.hop_length + 1

    def _token_mask(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return the mask of valid tokens, `b frames` or `b bands frames`."""
        frames = super()._token_mask(lengths, size)
        return frames if self.tokens_per_frame == 1 else frames.unsqueeze(1).repeat(1, self.tokens_per_frame, 1)

    def forward(
        self,
        waveform: Float[Tensor, "b s"],
        *,
        mask: Bool[Tensor, " b *grid"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert waveforms of any length to tokens.

        Args:
            waveform: Samples in [-1, 1].
            mask: Mask of valid tokens, `b frames` or `b bands frames`, True = attend.
            lengths: Number of samples of each waveform before padding, `b`. Samples beyond it are ignored.
        """
        checks.is_floating("waveform", waveform)
        checks.has_shape("waveform", waveform, "b s")
        waveform, mask = self._with_lengths(waveform, mask, lengths)
        frame_mask = None
        if mask is not None:
            frames = self.num_tokens(waveform.shape[1], 0)
            bands = () if self.tokens_per_frame == 1 else (self.tokens_per_frame,)
            checks.is_mask("mask", mask, (waveform.shape[0], *bands, frames))
            frame_mask = mask.any(1) if bands else mask
        content = self.frames(waveform, mask=frame_mask)
        if self.tokens_per_frame > 1:
            content = rearrange(content, "b frames (bands c) -> b bands frames c", bands=self.tokens_per_frame)
        return self._tokens("waveform", content, mask)

    def frames(
        self, waveform: Float[Tensor, "b s"], *, mask: Bool[Tensor, "b frames"] | None = None
    ) -> Float[Tensor, "b frames mels"]:
        """Return the log-mel spectrograms of waveforms, with one row per frame, computed in float32 or wider.

        Frames where `mask` is False are computed from zeros.
        """
        wide = waveform.to(torch.promote_types(waveform.dtype, torch.float32))
        missing = self.n_fft - self.win_length
        window = F.pad(self.window(self.win_length), (missing // 2, missing - missing // 2)).to(wide)
        half = self.n_fft // 2
        frames = F.pad(wide, (half, half)).unfold(-1, self.n_fft, self.hop_length)
        if mask is not None:
            frames = frames.masked_fill(~mask.unsqueeze(-1), 0.0)
        if not frames.shape[0]:  # MKL has no FFT of nothing
            return frames[..., :1].expand(-1, -1, self.num_mels).to(waveform.dtype)
        spectrum = torch.fft.rfft(frames * window)
        with checks.full_precision(waveform.device):
            power = (spectrum.real.square() + spectrum.imag.square()) @ self.filters().to(wide).mT
        return power.clamp_min(self.floor).log().to(waveform.dtype)

    def filters(self) -> Float[Tensor, "mels bins"]:
        """Return the triangular filters, with one row per mel band and one column per frequency bin, in float64."""
        edges = self.frequencies(self.f_min, self.f_max, self.num_mels + 2)[:, None]
        bins = torch.arange(self.n_fft // 2 + 1, dtype=torch.float64) * self.sample_rate / self.n_fft
        slopes = edges.diff(dim=0)
        filters = torch.minimum((bins - edges[:-2]) / slopes[:-1], (edges[2:] - bins) / slopes[1:]).clamp_min(0)
        return filters * 2 / (edges[2:] - edges[:-2]) if self.area_norm else filters
