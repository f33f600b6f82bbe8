"""Two frames for optical flow: every pixel knows its neighborhood in both."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.adapters.grid import check_axes, grid_tokens, token_dim
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class FramePair(nn.Module):
    """Two frames `b 2 c h w` to a token a pixel: the patches around it in both, projected.

    Patches are padded with zeros at the border. In a patch pixels come row by row, all channels of a pixel together;
    the first frame's patch comes first.

    Args:
        positions: position features over two axes; None for none.
        num_channels: 3 for color.
        patch_size: the side of a patch; odd.
        dim: what the patches are projected to.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=(368, 496))
        >>> pair = pc.adapters.FramePair(positions=where)
        >>> pair.dim, pair(torch.rand(1, 2, 3, 13, 17)).grid
        (322, (13, 17))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 and appendix H.
    """

    def __init__(self, *, positions: Positions | None, num_channels: int = 3, patch_size: int = 3, dim: int = 64) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels, patch_size=patch_size, dim=dim)
        if patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd, to have a pixel in its middle; got {patch_size}")
        check_axes("FramePair", positions, 2)
        self.positions, self.num_channels, self.patch_size = positions, num_channels, patch_size
        self.project = init.linear(2 * num_channels * patch_size * patch_size, dim)

    @property
    def dim(self) -> int:
        """The width of a token."""
        return token_dim(self.project.out_features, self.positions)

    def forward(self, frames: Float[Tensor, "b 2 c h w"], *, mask: Bool[Tensor, "b h w"] | None = None) -> Tokens:
        """The tokens of a pair of frames of any size.

        Args:
            frames: the earlier first; values as the model is trained, mostly in [-1, 1].
            mask: over pixels, True = attend.

        Raises:
            TypeError: frames that are not floating point.
            ValueError: other than two frames, another number of channels, NaN, a mask of another shape.
        """
        checks.is_floating("frames", frames)
        checks.has_shape("frames", frames, "b t c h w")
        if frames.shape[1] != 2:
            raise ValueError(f"frames must be two, b 2 c h w; got shape {tuple(frames.shape)}")
        checks.has_channels("frames", frames, 2, self.num_channels)
        return grid_tokens("frames", self.project(self.patches(frames)), self.positions, mask)

    def patches(self, frames: Float[Tensor, "b 2 c h w"]) -> Float[Tensor, "b h w patches"]:
        """The patches around every pixel, both frames' in a row."""
        height, width = frames.shape[-2:]
        around = F.unfold(frames.flatten(0, 1), self.patch_size, padding=self.patch_size // 2)
        return rearrange(
            around, "(b t) (c k) (h w) -> b h w (t k c)", t=2, c=self.num_channels, h=height, w=width
        )  # fmt: skip
