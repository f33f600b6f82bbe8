"""Waveforms: every decoder output is a patch of samples."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register


@register
class Waveform(nn.Module):
    """Every answer is a piece of a waveform.

    Args:
        dim: the width of an answer.
        patch_size: samples a piece.
        num_channels: of the waveform; one has no axis for them, as `adapters.Audio` wants it.

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
        self.dim, self.num_channels = dim, num_channels
        self.samples = init.linear(dim, num_channels * patch_size)

    def forward(self, answers: Float[Tensor, "b q d"]) -> Float[Tensor, "b *c s"]:
        """The pieces, one after the other."""
        checks.has_shape("answers", answers, "b q d", last=self.dim)
        sound = rearrange(self.samples(answers), "b q (patch c) -> b c (q patch)", c=self.num_channels)
        return sound[:, 0] if self.num_channels == 1 else sound
