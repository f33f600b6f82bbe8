"""Films: blocks of frames and pixels."""

from __future__ import annotations

from collections.abc import Sequence

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
class Video(nn.Module):
    """Films `b t c h w` to tokens: every block of frames, rows and columns is one.

    A token holds its pixels frame by frame, row by row, all channels of a pixel together. What blocks do not divide is
    padded with zeros at the end of each axis.

    Args:
        num_channels: 1 for grey, 3 for color, or any other number.
        positions: position features over three axes (time, rows, columns); None for none.
        patch_size: frames, rows and columns of a block.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(num_axes=3, num_bands=8, max_resolution=(16, 56, 56))
        >>> video = pc.adapters.Video(positions=where, patch_size=(1, 4, 4))
        >>> video.dim, video(torch.rand(2, 5, 3, 30, 44)).grid
        (99, (5, 8, 11))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind-research/perceiver, `space_to_depth`.
    """

    def __init__(self, num_channels: int = 3, *, positions: Positions | None, patch_size: Sequence[int] = (1, 4, 4)) -> None:
        super().__init__()
        if len(patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, rows, columns); got {patch_size!r}")
        checks.positive(num_channels=num_channels, frames=patch_size[0], rows=patch_size[1], columns=patch_size[2])
        check_axes("Video", positions, 3)
        self.num_channels, self.positions, self.patch_size = num_channels, positions, tuple(patch_size)

    @property
    def dim(self) -> int:
        """The width of a token."""
        frames, rows, columns = self.patch_size
        return token_dim(self.num_channels * frames * rows * columns, self.positions)

    def forward(
        self, films: Float[Tensor, "b t c h w"], *, mask: Bool[Tensor, "b times rows columns"] | None = None
    ) -> Tokens:
        """The tokens of films of any length and size.

        Args:
            films: values as the model is trained, mostly around [-1, 1].
            mask: over blocks, True = attend.

        Raises:
            TypeError: films that are not floating point.
            ValueError: another rank or number of channels, an empty film, NaN, a mask of another shape.
        """
        checks.is_floating("films", films)
        checks.has_shape("films", films, "b t c h w")
        checks.has_channels("films", films, 2, self.num_channels)
        frames, rows, columns = self.patch_size
        over = -films.shape[4] % columns, -films.shape[3] % rows, -films.shape[1] % frames
        films = F.pad(films, (0, over[0], 0, over[1], 0, 0, 0, over[2]))
        content = rearrange(
            films, "b (t frames) c (h rows) (w columns) -> b t h w (frames rows columns c)",
            frames=frames, rows=rows, columns=columns,
        )  # fmt: skip
        return grid_tokens("films", content, self.positions, mask)
