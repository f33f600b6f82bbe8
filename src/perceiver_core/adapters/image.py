"""Pictures of any size, grey or color."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.grid import check_axes, grid_tokens, token_dim
from perceiver_core.adapters.stems import Pixels
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Image(nn.Module):
    """Pictures `b c h w` to tokens: a stem, then a position for every point of its grid.

    Args:
        num_channels: 1 for grey, 3 for color, or any other number.
        positions: position features over two axes; None for none.
        stem: makes the stem from (channels): `Pixels`, or `functools.partial` of `Patches`, `Project`, `ConvStem`,
            or any module with `.dim` that maps `b c h w` to `b dim h' w'`.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=64)
        >>> image = pc.adapters.Image(num_channels=1, positions=where, stem=partial(pc.adapters.Patches, patch_size=4))
        >>> image.dim, image(torch.rand(2, 1, 60, 44)).grid
        (50, (15, 11))
    """

    def __init__(
        self, num_channels: int = 3, *, positions: Positions | None, stem: Callable[..., nn.Module] = Pixels
    ) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels)
        check_axes("Image", positions, 2)
        self.num_channels, self.positions = num_channels, positions
        self.stem = stem(num_channels)

    @property
    def dim(self) -> int:
        """The width of a token."""
        return token_dim(int(self.stem.dim), self.positions)  # type: ignore[arg-type]

    def forward(
        self, pictures: Float[Tensor, "b c h w"], *, mask: Bool[Tensor, "b rows columns"] | None = None
    ) -> Tokens:
        """The tokens of pictures.

        Args:
            pictures: any height and width; values as the model is trained, mostly around [-1, 1].
            mask: over the grid of tokens (that of pixels, or of patches), True = attend. Masked pixels are zeros
                to a stem whose tokens overlap.

        Raises:
            TypeError: pictures that are not floating point.
            ValueError: another rank or number of channels, an empty picture, NaN, a mask of another shape.
        """
        checks.is_floating("pictures", pictures)
        checks.has_shape("pictures", pictures, "b c h w")
        checks.has_channels("pictures", pictures, 1, self.num_channels)
        for weight in self.stem.parameters():
            checks.same_place("pictures", pictures, weight)
            break
        pixels = None if mask is None else self._pixels(mask, pictures)
        if pixels is not None:
            pictures = pictures.masked_fill(~pixels.unsqueeze(1), 0.0)
        checks.values("pictures", pictures.movedim(1, -1), pixels)  # before a batch norm keeps what it saw
        content = self.stem(pictures).movedim(1, -1)
        return grid_tokens("pictures", content, self.positions, mask)

    def _pixels(self, mask: Tensor, pictures: Tensor) -> Tensor | None:
        """The mask of tokens as one of pixels, where the stem says how many pixels of each axis a token stands for."""
        checks.is_mask("mask", mask)
        high, wide = getattr(self.stem, "stride", (0, 0))
        height, width = pictures.shape[-2:]
        if not high or tuple(mask.shape[1:]) != (-(-height // high), -(-width // wide)):
            return None  # a stem of the user's, or a mask that does not fit and is refused with its tokens
        return mask.repeat_interleave(high, 1).repeat_interleave(wide, 2)[:, :height, :width]
