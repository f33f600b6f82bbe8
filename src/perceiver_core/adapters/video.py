"""Adapters for videos, and for pairs of frames (optical flow)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.adapters.grid import GridAdapter
from perceiver_core.adapters.lengths import Lengths
from perceiver_core.adapters.patchify import patchify
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Video(GridAdapter):
    """Adapter for videos `b t c h w`: one token per three-dimensional patch.

    Each patch is flattened from the layout (frame, row, column, channel). Incomplete patches at the end of an axis are
    padded with zeros.

    Args:
        num_channels: Number of video channels, such as 1 for grayscale or 3 for color.
        positions: Position encoding with three axes (time, rows, columns); None for no position encoding.
        patch_size: Patch size (frames, rows, columns).

    Example:
        >>> positions = pc.positions.Fourier(num_axes=3, num_bands=8, max_resolution=(16, 56, 56))
        >>> video = pc.adapters.Video(positions=positions, patch_size=(1, 4, 4))
        >>> video.dim, video(torch.rand(2, 5, 3, 30, 44)).grid
        (99, (5, 8, 11))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind-research/perceiver, `space_to_depth`.
    """

    length_axes = (-4, -2, -1)

    def __init__(
        self, num_channels: int = 3, *, positions: Positions | None, patch_size: Sequence[int] = (1, 4, 4)
    ) -> None:
        if len(patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, rows, columns); got {patch_size!r}")
        checks.positive(num_channels=num_channels, **{f"patch_size[{i}]": size for i, size in enumerate(patch_size)})
        super().__init__(num_channels * prod(patch_size), positions, num_axes=3)
        self.num_channels, self.patch_size = num_channels, tuple(patch_size)
        self.stride = self.patch_size

    def forward(
        self,
        video: Float[Tensor, "b t c h w"],
        *,
        mask: Bool[Tensor, "b times rows columns"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert videos of any length and size to tokens.

        Args:
            video: Pixel values, normalized as in training (mostly to [-1, 1]).
            mask: Mask of valid patches, True = attend.
            lengths: Size of each video before padding: its number of frames, `b`, or (frames, height, width), `b 3`.
        """
        checks.channels_first("video", video, "b t c h w", self.num_channels, channel_axis=2)
        video, mask = self._with_lengths(video, mask, lengths)
        return self._tokens("video", patchify(video.transpose(1, 2), self.patch_size), mask)


@register
class FramePair(GridAdapter):
    """Adapter for frame pairs `b 2 c h w`: one token per pixel.

    A token is a linear projection of the two patches around the pixel, one per frame, followed by the position
    encoding. Before the projection, both patches are flattened from the layout (frame, row, column, channel). Frames
    are padded with zeros at the border.

    Args:
        positions: Position encoding with two axes (rows, columns); None for no position encoding.
        num_channels: Number of channels per frame, such as 3 for color.
        patch_size: Height and width of a patch in pixels, an odd number.
        dim: Output width of the linear projection.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=(368, 496))
        >>> pair = pc.adapters.FramePair(positions=positions)
        >>> pair.dim, pair(torch.rand(1, 2, 3, 13, 17)).grid
        (322, (13, 17))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 and appendix H.
    """

    length_axes, time_axis = (-2, -1), None

    def __init__(
        self, *, positions: Positions | None, num_channels: int = 3, patch_size: int = 3, dim: int = 64
    ) -> None:
        checks.positive(num_channels=num_channels, patch_size=patch_size, dim=dim)
        if patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd, to have a pixel in its middle; got {patch_size}")
        super().__init__(dim, positions, num_axes=2)
        self.num_channels, self.patch_size = num_channels, patch_size
        self.project = init.linear(2 * num_channels * patch_size * patch_size, dim)

    def forward(
        self,
        frames: Float[Tensor, "b 2 c h w"],
        *,
        mask: Bool[Tensor, "b h w"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert frame pairs of any size to tokens.

        Args:
            frames: Pixel values, normalized as in training (mostly to [-1, 1]). `frames[:, 0]` is the earlier frame.
            mask: Mask of valid pixels, True = attend. Masked pixels are set to zero.
            lengths: Height and width of each frame pair before padding, `b 2`.
        """
        checks.channels_first("frames", frames, "b t c h w", self.num_channels, channel_axis=2)
        if frames.shape[1] != 2:
            raise ValueError(f"frames must be two, b 2 c h w; got shape {tuple(frames.shape)}")
        frames, mask = self._with_lengths(frames, mask, lengths)
        if mask is not None:  # the patches of valid pixels overlap with masked pixels
            checks.is_mask("mask", mask, (frames.shape[0], *frames.shape[-2:]))
            frames = frames.masked_fill(~mask[:, None, None], 0.0)
        return self._tokens("frames", apply_linear(self.project, self.patches(frames)), mask)

    def patches(self, frames: Float[Tensor, "b 2 c h w"]) -> Float[Tensor, "b h w patches"]:
        """Return one vector per pixel: the patches around the pixel in both frames, flattened and concatenated."""
        height, width = frames.shape[-2:]
        columns = F.unfold(frames.flatten(0, 1), self.patch_size, padding=self.patch_size // 2)
        return rearrange(columns, "(b t) (c k) (h w) -> b h w (t k c)", t=2, c=self.num_channels, h=height, w=width)
