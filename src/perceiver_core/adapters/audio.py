"""Sound: raw samples in patches, or a spectrogram that the user has computed."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.adapters.grid import check_axes, grid_tokens, token_dim
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Audio(nn.Module):
    """Raw samples `b c s`, or `b s` of one channel: every `patch_size` samples are a token.

    What is left over at the end is padded with zeros. A token holds its samples in a row, all channels of a sample
    together.

    Args:
        patch_size: samples a token.
        positions: position features over one axis; None for none.
        num_channels: 1 for mono, 2 for stereo.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(num_axes=1, num_bands=64, max_resolution=480)
        >>> audio = pc.adapters.Audio(patch_size=128, positions=where)
        >>> audio.dim, audio(torch.randn(2, 61_440)).num_tokens
        (257, 480)

    Reference: Jaegle et al. 2021 (Perceiver), section 4.2.
    """

    def __init__(self, patch_size: int = 16, *, positions: Positions | None, num_channels: int = 1) -> None:
        super().__init__()
        checks.positive(patch_size=patch_size, num_channels=num_channels)
        check_axes("Audio", positions, 1)
        self.patch_size, self.num_channels, self.positions = patch_size, num_channels, positions

    @property
    def dim(self) -> int:
        """The width of a token."""
        return token_dim(self.patch_size * self.num_channels, self.positions)

    def forward(self, samples: Float[Tensor, "b *c s"], *, mask: Bool[Tensor, "b patches"] | None = None) -> Tokens:
        """The tokens of sounds of any length.

        Args:
            samples: the waveform, in [-1, 1].
            mask: over patches, True = attend. Positions span all patches, masked ones too: the same sound padded to
                two lengths has two sets of positions.

        Raises:
            TypeError: samples that are not floating point.
            ValueError: another rank or number of channels, no samples, NaN, a mask of another shape.
        """
        checks.is_floating("samples", samples)
        if samples.ndim != 3 and self.num_channels == 1:
            checks.has_shape("samples", samples, "b s")
            samples = samples.unsqueeze(1)
        checks.has_shape("samples", samples, "b c s")
        checks.has_channels("samples", samples, 1, self.num_channels)
        padded = F.pad(samples, (0, -samples.shape[-1] % self.patch_size))
        patches = rearrange(padded, "b c (n p) -> b n (p c)", p=self.patch_size)
        return grid_tokens("samples", patches, self.positions, mask)


@register
class Spectrogram(nn.Module):
    """A (log-mel) spectrogram `b bins frames`: every value is a token.

    Args:
        positions: position features over two axes, bins and frames; None for none.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=(128, 1024))
        >>> pc.adapters.Spectrogram(positions=where)(torch.randn(2, 128, 37)).grid
        (128, 37)
    """

    def __init__(self, *, positions: Positions | None) -> None:
        super().__init__()
        check_axes("Spectrogram", positions, 2)
        self.positions = positions

    @property
    def dim(self) -> int:
        """The width of a token."""
        return token_dim(1, self.positions)

    def forward(
        self, spectrogram: Float[Tensor, "b bins frames"], *, mask: Bool[Tensor, "b bins frames"] | None = None
    ) -> Tokens:
        """The tokens of spectrograms with any number of bins and frames.

        Raises:
            TypeError: values that are not floating point.
            ValueError: another rank, an empty spectrogram, NaN, a mask of another shape.
        """
        checks.is_floating("spectrogram", spectrogram)
        checks.has_shape("spectrogram", spectrogram, "b bins frames")
        return grid_tokens("spectrogram", spectrogram.unsqueeze(-1), self.positions, mask)
