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
        channels: 1 for grey, 3 for color, or any other number.
        positions: position features over three axes (time, rows, columns); None for none.
        patch: frames, rows and columns of a block.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(axes=3, bands=8, max_resolution=(16, 56, 56))
        >>> video = pc.adapters.Video(positions=where, patch=(1, 4, 4))
        >>> video.dim, video(torch.rand(2, 5, 3, 30, 44)).grid
        (99, (5, 8, 11))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind-research/perceiver, `space_to_depth`.
    """

    def __init__(self, channels: int = 3, *, positions: Positions | None, patch: Sequence[int] = (1, 4, 4)) -> None:
        super().__init__()
        if len(patch) != 3:
            raise ValueError(f"patch must be (frames, rows, columns); got {patch!r}")
        checks.positive(channels=channels, frames=patch[0], rows=patch[1], columns=patch[2])
        check_axes("Video", positions, 3)
        self.channels, self.positions, self.patch = channels, positions, tuple(patch)

    @property
    def dim(self) -> int:
        """The width of a token."""
        frames, rows, columns = self.patch
        return token_dim(self.channels * frames * rows * columns, self.positions)

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
        checks.has_channels("films", films, 2, self.channels)
        frames, rows, columns = self.patch
        over = -films.shape[4] % columns, -films.shape[3] % rows, -films.shape[1] % frames
        films = F.pad(films, (0, over[0], 0, over[1], 0, 0, 0, over[2]))
        content = rearrange(
            films, "b (t frames) c (h rows) (w columns) -> b t h w (frames rows columns c)",
            frames=frames, rows=rows, columns=columns,
        )  # fmt: skip
        return grid_tokens("films", content, self.positions, mask)
