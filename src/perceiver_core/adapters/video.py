"""Videos in blocks of frames, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.grid import check_axes, grid_tokens, token_dim
from perceiver_core.adapters.patchify import patchify
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Video(nn.Module):
    """Adapter for videos `b t c h w`: every block of frames, rows and columns is a token.

    A token holds its pixels frame by frame, row by row, all channels of a pixel together. Incomplete blocks at the end
    of an axis are padded with zeros.

    Args:
        num_channels: Number of channels of a pixel: 1 for grayscale, 3 for color, or any other.
        positions: Position features over three axes (time, rows, columns); None for none.
        patch_size: Number of frames, rows and columns of a block.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> positions = pc.positions.Fourier(num_axes=3, num_bands=8, max_resolution=(16, 56, 56))
        >>> video = pc.adapters.Video(positions=positions, patch_size=(1, 4, 4))
        >>> video.dim, video(torch.rand(2, 5, 3, 30, 44)).grid
        (99, (5, 8, 11))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind-research/perceiver, `space_to_depth`.
    """

    def __init__(
        self, num_channels: int = 3, *, positions: Positions | None, patch_size: Sequence[int] = (1, 4, 4)
    ) -> None:
        super().__init__()
        if len(patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, rows, columns); got {patch_size!r}")
        checks.positive(num_channels=num_channels, frames=patch_size[0], rows=patch_size[1], columns=patch_size[2])
        check_axes("Video", positions, 3)
        self.num_channels, self.positions, self.patch_size = num_channels, positions, tuple(patch_size)
        self.dim = token_dim(num_channels * prod(patch_size), positions)

    def forward(
        self, video: Float[Tensor, "b t c h w"], *, mask: Bool[Tensor, "b times rows columns"] | None = None
    ) -> Tokens:
        """Return the tokens of videos of any length and size.

        Args:
            video: Values as in training, mostly around [-1, 1].
            mask: Valid blocks, True = attend.
        """
        checks.channels_first("video", video, "b t c h w", self.num_channels, channel_axis=2)
        return grid_tokens("video", patchify(video.transpose(1, 2), self.patch_size), self.positions, mask)
