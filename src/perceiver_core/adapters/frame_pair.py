"""Pairs of frames for optical flow: a token per pixel, with its neighborhood in both frames."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.adapters.grid import check_axes, grid_tokens, token_dim
from perceiver_core.layers import init
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class FramePair(nn.Module):
    """Adapter for two frames `b 2 c h w`: a token per pixel, projected from the patches around it in both frames.

    Patches are padded with zeros at the border. The patch of the first frame comes first; its pixels are in row-major
    order, all channels of a pixel together.

    Args:
        positions: Position features over two axes; None for none.
        num_channels: Number of channels of a pixel: 3 for color.
        patch_size: Side of a patch in pixels; odd.
        dim: Width of the projected patches, without positions.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=(368, 496))
        >>> pair = pc.adapters.FramePair(positions=positions)
        >>> pair.dim, pair(torch.rand(1, 2, 3, 13, 17)).grid
        (322, (13, 17))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 and appendix H.
    """

    def __init__(
        self, *, positions: Positions | None, num_channels: int = 3, patch_size: int = 3, dim: int = 64
    ) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels, patch_size=patch_size, dim=dim)
        if patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd, to have a pixel in its middle; got {patch_size}")
        check_axes("FramePair", positions, 2)
        self.positions, self.num_channels, self.patch_size = positions, num_channels, patch_size
        self.dim = token_dim(dim, positions)
        self.project = init.linear(2 * num_channels * patch_size * patch_size, dim)

    def forward(self, frames: Float[Tensor, "b 2 c h w"], *, mask: Bool[Tensor, "b h w"] | None = None) -> Tokens:
        """Return the tokens of pairs of frames of any size.

        Args:
            frames: The earlier frame, then the later; values as in training, mostly in [-1, 1].
            mask: Valid pixels, True = attend.
        """
        checks.is_floating("frames", frames)
        checks.has_shape("frames", frames, "b t c h w")
        if frames.shape[1] != 2:
            raise ValueError(f"frames must be two, b 2 c h w; got shape {tuple(frames.shape)}")
        checks.has_channels("frames", frames, 2, self.num_channels)
        return grid_tokens("frames", self.project(self.patches(frames)), self.positions, mask)

    def patches(self, frames: Float[Tensor, "b 2 c h w"]) -> Float[Tensor, "b h w patches"]:
        """Return the patches around every pixel, those of both frames concatenated."""
        height, width = frames.shape[-2:]
        columns = F.unfold(frames.flatten(0, 1), self.patch_size, padding=self.patch_size // 2)
        return rearrange(columns, "(b t) (c k) (h w) -> b h w (t k c)", t=2, c=self.num_channels, h=height, w=width)
