"""Waveforms: every decoder output is a patch of samples."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.patchify import unpatchify
from perceiver_core.layers import init
from perceiver_core.registry import register


@register
class Waveform(nn.Module):
    """Waveform from decoder outputs, each projected to a patch of samples.

    Args:
        dim: Width of a decoder output.
        patch_size: Number of samples per patch.
        num_channels: Number of channels; a waveform of one channel has no channel axis, as in `adapters.Audio`.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Waveform(32, patch_size=16)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 960])
        >>> heads.Waveform(32, patch_size=16, num_channels=2)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 2, 960])

    Reference: deepmind-research/perceiver/io_processors.py, `AudioPostprocessor`.
    """

    def __init__(self, dim: int, patch_size: int, *, num_channels: int = 1) -> None:
        super().__init__()
        checks.positive(dim=dim, patch_size=patch_size, num_channels=num_channels)
        self.dim, self.patch_size, self.num_channels = dim, patch_size, num_channels
        self.samples = init.linear(dim, num_channels * patch_size)

    def forward(self, outputs: Float[Tensor, "b q d"]) -> Float[Tensor, "b *c s"]:
        """Return the patches of all outputs, concatenated."""
        checks.has_shape("outputs", outputs, "b q d", last=self.dim)
        waveform = unpatchify(self.samples(outputs), (self.patch_size,))
        return waveform[:, 0] if self.num_channels == 1 else waveform
