"""Images of any size, grayscale or color."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.grid import GridAdapter
from perceiver_core.adapters.stems import Pixels
from perceiver_core.blocks.factory import build
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Image(GridAdapter):
    """Adapter for images `b c h w`: a stem, then one token per point of its output.

    Args:
        num_channels: Number of channels of a pixel: 1 for grayscale, 3 for color, or any other.
        positions: Position features over two axes; None for none.
        stem: Factory `num_channels -> module`: `Pixels`, `functools.partial` of `Patches`, `Project` or `ConvStem`, or
            any module with `.dim` from `b c h w` to `b dim h' w'`.

    Example:
        >>> from functools import partial
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=64)
        >>> stem = partial(pc.adapters.Patches, patch_size=4)
        >>> image = pc.adapters.Image(num_channels=1, positions=positions, stem=stem)
        >>> image.dim, image(torch.rand(2, 1, 60, 44)).grid
        (50, (15, 11))
    """

    def __init__(
        self, num_channels: int = 3, *, positions: Positions | None, stem: Callable[[int], nn.Module] = Pixels
    ) -> None:
        checks.positive(num_channels=num_channels)
        layers = build(stem, num_channels)
        super().__init__(cast(Any, layers).dim, positions, num_axes=2)
        self.num_channels, self.stem = num_channels, layers

    def forward(
        self, images: Float[Tensor, "b c h w"], *, mask: Bool[Tensor, "b rows columns"] | None = None
    ) -> Tokens:
        """Return the tokens of images of any height and width.

        Args:
            images: Values as in training, mostly around [-1, 1].
            mask: Valid tokens on their grid (of pixels, or of patches), True = attend. A stem whose tokens overlap sees
                masked pixels as zeros.
        """
        checks.channels_first("images", images, "b c h w", self.num_channels)
        if (convolution := getattr(self.stem, "convolution", None)) is not None:
            checks.matches_weight("images", images, convolution)
        pixel_mask = None if mask is None else self._pixel_mask(mask, images)
        if pixel_mask is not None:
            images = images.masked_fill(~pixel_mask.unsqueeze(1), 0.0)
        if type(self.stem) is not Pixels:  # whose output is the image, checked below
            checks.values("images", images.movedim(1, -1), pixel_mask)  # before a batch norm updates its statistics
        return self._tokens("images", self.stem(images).movedim(1, -1), mask)

    def _pixel_mask(self, mask: Tensor, images: Tensor) -> Tensor | None:
        """Return the mask of tokens as a mask of pixels, if the stem has a `stride`, the pixels per token."""
        checks.is_mask("mask", mask)
        rows, columns = getattr(self.stem, "stride", (0, 0))
        height, width = images.shape[-2:]
        if not rows or tuple(mask.shape[1:]) != (-(-height // rows), -(-width // columns)):
            return None  # a stem of the user's, or a mask of a wrong shape, which raises later
        return mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, :height, :width]
