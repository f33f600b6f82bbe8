"""Adapters for waveforms and for precomputed spectrograms."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import checks
from perceiver_core.adapters.grid import GridAdapter
from perceiver_core.adapters.lengths import Lengths
from perceiver_core.adapters.patchify import patchify
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Audio(GridAdapter):
    """Adapter for waveforms `b c s` (or `b s` for mono): one token per patch of `patch_size` samples.

    Patches are flattened with the channels last, so stereo samples alternate between left and right. An incomplete last
    patch is padded with zeros.

    Args:
        patch_size: Number of samples per token.
        positions: Position encoding with one axis; None for no position encoding. Use `positions.FixedGrid` for
            positions in units of patches, which do not depend on the length of the waveform.
        num_channels: Number of audio channels: 1 for mono, 2 for stereo.

    Example:
        >>> fourier = pc.positions.Fourier(num_axes=1, num_bands=64, max_resolution=480)
        >>> positions = pc.positions.FixedGrid(fourier, grid=(480,))
        >>> audio = pc.adapters.Audio(patch_size=128, positions=positions)
        >>> audio.dim, audio(torch.randn(2, 61_440)).num_tokens
        (257, 480)
        >>> audio(torch.randn(2, 61_440), lengths=[61_440, 1000]).mask.sum(1).tolist()
        [480, 8]

    Reference: Jaegle et al. 2021 (Perceiver), section 4.2.
    """

    def __init__(self, patch_size: int = 16, *, positions: Positions | None, num_channels: int = 1) -> None:
        checks.positive(patch_size=patch_size, num_channels=num_channels)
        super().__init__(patch_size * num_channels, positions, num_axes=1)
        self.patch_size, self.num_channels, self.stride = patch_size, num_channels, (patch_size,)

    def forward(
        self,
        waveform: Float[Tensor, "b *c s"],
        *,
        mask: Bool[Tensor, "b patches"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert waveforms of any length to tokens.

        Args:
            waveform: Samples in [-1, 1].
            mask: Mask of valid patches, True = attend. It does not affect the position encodings.
            lengths: Number of samples of each waveform before padding, `b`. Samples beyond it are ignored.
        """
        checks.is_floating("waveform", waveform)
        if waveform.ndim != 3 and self.num_channels == 1:
            checks.has_shape("waveform", waveform, "b s")
            waveform = waveform.unsqueeze(1)
        checks.channels_first("waveform", waveform, "b c s", self.num_channels)
        waveform, mask = self._with_lengths(waveform, mask, lengths)
        return self._tokens("waveform", patchify(waveform, (self.patch_size,)), mask)


@register
class Spectrogram(GridAdapter):
    """Adapter for spectrograms `b bins frames`, such as log-mel spectrograms: one token per value.

    Args:
        positions: Position encoding with two axes (bins, frames); None for no position encoding. Use
            `positions.FixedGrid` for positions that do not depend on the number of frames.

    Example:
        >>> fourier = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=(128, 1024))
        >>> positions = pc.positions.FixedGrid(fourier, grid=(128, 1024))
        >>> pc.adapters.Spectrogram(positions=positions)(torch.randn(2, 128, 37)).grid
        (128, 37)
    """

    length_axes, time_axis = (-2, -1), 1

    def __init__(self, *, positions: Positions | None) -> None:
        super().__init__(1, positions, num_axes=2)

    def forward(
        self,
        spectrogram: Float[Tensor, "b bins frames"],
        *,
        mask: Bool[Tensor, "b bins frames"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert spectrograms with any number of bins and frames to tokens.

        Args:
            spectrogram: Values of the spectrograms, such as log-mel energies.
            mask: Mask of valid values, True = attend.
            lengths: Size of each spectrogram before padding: its number of frames, `b`, or (bins, frames), `b 2`.
        """
        checks.is_floating("spectrogram", spectrogram)
        checks.has_shape("spectrogram", spectrogram, "b bins frames")
        spectrogram, mask = self._with_lengths(spectrogram, mask, lengths)
        return self._tokens("spectrogram", spectrogram.unsqueeze(-1), mask)
