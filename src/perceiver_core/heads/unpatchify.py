"""Heads that assemble images, videos and waveforms from patches, one per decoder output."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.patchify import patchify, unpatchify
from perceiver_core.heads.grid import Grid
from perceiver_core.heads.linear import Linear
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.registry import register


@register
class Unpatchify(nn.Module):
    """Head that projects decoder outputs to patches and assembles images `b c h w` or videos `b t c h w` from them.

    Args:
        dim: Width of the decoder outputs.
        grid: Number of patches along each axis; None to use the grid size of the queries.
        patch_size: Patch size in pixels: (height, width) for images, (frames, height, width) for videos.
        num_channels: Number of image or video channels.

    Example:
        >>> head = pc.heads.Unpatchify(32, grid=(4, 5), patch_size=(2, 3), num_channels=3)
        >>> head(torch.randn(2, 20, 32)).shape
        torch.Size([2, 3, 8, 15])
        >>> indices = torch.tensor([0, 19])
        >>> head(torch.randn(2, 2, 32), query_inputs=indices).shape
        torch.Size([2, 2, 18])
        >>> head.cut(torch.rand(2, 3, 8, 15))[:, indices].shape
        torch.Size([2, 2, 18])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (video patches as input); deepmind-research/perceiver,
    io_processors.py, `reverse_space_to_depth`.
    """

    needs_query_layout = True

    def __init__(
        self, dim: int, *, grid: Sequence[int] | None, patch_size: Sequence[int], num_channels: int = 3
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, num_channels=num_channels, **{f"patch_size[{i}]": n for i, n in enumerate(patch_size)})
        if len(patch_size) not in (2, 3):
            raise ValueError(
                f"patch_size must have two axes, for images, or three, for videos; got {tuple(patch_size)}"
            )
        if grid is not None and len(grid) != len(patch_size):
            raise ValueError(f"grid must have the number of axes of patch_size, {len(patch_size)}; got {tuple(grid)}")
        self.dim, self.patch_size, self.num_channels = dim, tuple(patch_size), num_channels
        self.patches = Grid(grid, head=Linear(dim, num_channels * prod(patch_size)), channel_axis=-1)

    def forward(
        self, outputs: Float[Tensor, "b q d"], *, query_inputs: object = None, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b ..."]:
        """Return images or videos, or flattened patches `b q values` if `query_inputs` selects queries."""
        patches = self.patches(outputs, query_inputs=query_inputs, grid=grid)
        if query_inputs is not None:
            return patches
        return unpatchify(patches, self.patch_size, channel_axis=len(self.patch_size) - 1)

    def cut(self, pixels: Float[Tensor, "b ..."]) -> Float[Tensor, "b n values"]:
        """Cut images or videos into flattened patches `b n values` in row-major order, to use as training targets.

        Raises:
            ValueError: If the number of channels is wrong, or the size is not a multiple of the patch size.
        """
        axes = "b c h w" if len(self.patch_size) == 2 else "b t c h w"
        checks.has_shape("pixels", pixels, axes)
        pixels = pixels.movedim(-3, 1)
        whole = all(n % patch == 0 for n, patch in zip(pixels.shape[2:], self.patch_size, strict=True))
        if pixels.shape[1] != self.num_channels or not whole:
            raise ValueError(
                f"pixels must be {axes} of {self.num_channels} channels and whole patches {self.patch_size}; "
                f"got shape {tuple(pixels.movedim(1, -3).shape)}"
            )
        return patchify(pixels, self.patch_size).flatten(1, -2)


@register
class Waveform(nn.Module):
    """Head that projects decoder outputs to patches of audio samples and concatenates the patches to waveforms.

    Args:
        dim: Width of the decoder outputs.
        patch_size: Number of samples per patch.
        num_channels: Number of audio channels. Waveforms have shape `b s` for one channel (mono), otherwise `b c s`.

    Example:
        >>> pc.heads.Waveform(32, patch_size=16)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 960])
        >>> pc.heads.Waveform(32, patch_size=16, num_channels=2)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 2, 960])

    Reference: deepmind-research/perceiver/io_processors.py, `AudioPostprocessor`.
    """

    def __init__(self, dim: int, patch_size: int, *, num_channels: int = 1) -> None:
        super().__init__()
        checks.positive(dim=dim, patch_size=patch_size, num_channels=num_channels)
        self.dim, self.patch_size, self.num_channels = dim, patch_size, num_channels
        self.samples = init.linear(dim, num_channels * patch_size)

    def forward(self, outputs: Float[Tensor, "b q d"]) -> Float[Tensor, "b *c s"]:
        """Return waveforms of `q * patch_size` audio samples."""
        checks.has_shape("outputs", outputs, "b q d", last=self.dim)
        waveform = unpatchify(apply_linear(self.samples, outputs), (self.patch_size,))
        return waveform[:, 0] if self.num_channels == 1 else waveform
