"""Adapter for images of any size, grayscale or color."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.grid import GridAdapter
from perceiver_core.adapters.lengths import Lengths, Size
from perceiver_core.adapters.stems import Pixels, SymmetricPadConvStem
from perceiver_core.blocks.factory import build
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Image(GridAdapter):
    """Adapter for images `b c h w`: one token per position of the feature map that a stem computes from the pixels.

    Args:
        num_channels: Number of image channels, such as 1 for grayscale or 3 for color.
        positions: Position encoding with two axes (rows, columns); None for no position encoding.
        stem: Factory `num_channels -> module`, such as `Pixels` or a `functools.partial` of `Patches`, `Project` or
            `ConvStem`. The module must have the attribute `dim` and map `b c h w` to `b dim h' w'`.

    Example:
        >>> from functools import partial
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=64)
        >>> stem = partial(pc.adapters.Patches, patch_size=4)
        >>> image = pc.adapters.Image(num_channels=1, positions=positions, stem=stem)
        >>> image.dim, image(torch.rand(2, 1, 60, 44)).grid
        (50, (15, 11))
    """

    length_axes, time_axis = (-2, -1), None

    def __init__(
        self, num_channels: int = 3, *, positions: Positions | None, stem: Callable[[int], nn.Module] = Pixels
    ) -> None:
        checks.positive(num_channels=num_channels)
        layers = build("stem", stem, num_channels)
        super().__init__(cast(Any, layers).dim, positions, num_axes=2)
        self.num_channels, self.stem, self.stride = num_channels, layers, tuple(getattr(layers, "stride", ()))

    def num_tokens(self, length: Size, axis: int) -> Size:
        """Return the number of rows of tokens (`axis=0`) or columns (`axis=1`) for an image of this height or width."""
        if not self.stride:
            raise ValueError(
                "lengths need a stem with the attribute stride (rows, columns); pass a mask of tokens instead"
            )
        if isinstance(self.stem, SymmetricPadConvStem):
            return ((length + 1) // 2 - 1) // 2
        return super().num_tokens(length, axis)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        mask: Bool[Tensor, "b rows columns"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert images of any height and width to tokens.

        Args:
            images: Pixel values, normalized as in training (mostly to [-1, 1]).
            mask: Mask of valid tokens (one per position of the feature map), True = attend. The pixels of masked tokens
                are set to zero before the stem. If the stem has no attribute `stride`, it receives all pixels
                unchanged, and even masked pixels must be finite.
            lengths: Height and width of each image before padding, `b 2`. Padding pixels are ignored. With a
                convolutional stem such as `ConvStem`, tokens differ from those of the unpadded image: those next to the
                padding, or all if both sizes have different remainders modulo 4.
        """
        checks.channels_first("images", images, "b c h w", self.num_channels)
        if (convolution := getattr(self.stem, "convolution", None)) is not None:
            checks.matches_weight("images", images, convolution)
        images, mask = self._with_lengths(images, mask, lengths)
        pixel_mask = None if mask is None else self._pixel_mask(mask, images)
        if pixel_mask is not None:
            images = images.masked_fill(~pixel_mask.unsqueeze(1), 0.0)
        if type(self.stem) is not Pixels:  # _tokens checks the output of Pixels, which is the images themselves
            checks.values("images", images.movedim(1, -1), pixel_mask)  # before batch norm updates its statistics
        return self._tokens("images", self.stem(images).movedim(1, -1), mask)

    def _pixel_mask(self, mask: Tensor, images: Tensor) -> Tensor | None:
        """Expand a token mask to pixels. Return None if the stem has no `stride` or the mask has the wrong shape."""
        checks.is_mask("mask", mask)
        for axis, stride in enumerate(getattr(self.stem, "stride", (0, 0)), start=1):
            size = images.shape[axis + 1]
            # If a stem does not pad the end (SymmetricPadConvStem), the remaining pixels belong to the last token.
            if (
                not stride
                or mask.ndim != 3
                or 0 in mask.shape[1:]
                or (size + stride - 1) // stride - mask.shape[axis] not in (0, 1)
            ):
                return None  # `_tokens` raises an error if the mask has the wrong shape
            tokens = torch.arange(size, device=mask.device) // stride
            mask = mask.index_select(axis, tokens.clamp(max=mask.shape[axis] - 1))
        return mask
