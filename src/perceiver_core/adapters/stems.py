"""Image stems: modules that map images to feature maps. The adapter `Image` converts each position to a token.

A stem has two attributes: `dim` is its number of output channels, and `stride` is its stride in pixels (rows, columns).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.adapters.patchify import patchify
from perceiver_core.layers import init
from perceiver_core.registry import register


@register
class Pixels(nn.Module):
    """Image stem that returns the image unchanged, for one token per pixel.

    Example:
        >>> pc.adapters.Pixels(3)(torch.rand(2, 3, 5, 7)).shape
        torch.Size([2, 3, 5, 7])
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.dim, self.stride = num_channels, (1, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the images unchanged."""
        return x


@register
class Patches(nn.Module):
    """Image stem that flattens patches, for one token per patch.

    Each patch is flattened from the layout (row, column, channel), so the channels of a pixel stay adjacent. Incomplete
    patches at the bottom and at the right are padded with zeros.

    Args:
        num_channels: Number of image channels.
        patch_size: Patch size in pixels: one number, or (height, width).

    Example:
        >>> pc.adapters.Patches(3, patch_size=(2, 4))(torch.rand(2, 3, 5, 16)).shape
        torch.Size([2, 24, 3, 4])

    Reference: deepmind-research/perceiver/io_processors.py, `space_to_depth`.
    """

    def __init__(self, num_channels: int, *, patch_size: int | Sequence[int]) -> None:
        super().__init__()
        sides = [patch_size, patch_size] if isinstance(patch_size, int) else list(patch_size)
        if len(sides) != 2:
            raise ValueError(f"patch_size must be one number, or (height, width); got {patch_size!r}")
        checks.positive(num_channels=num_channels, **{f"patch_size[{i}]": side for i, side in enumerate(sides)})
        self.dim, self.stride = num_channels * sides[0] * sides[1], (sides[0], sides[1])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p rows columns"]:
        """Return the flattened patches, with the values of a patch along the channel axis."""
        return patchify(x, self.stride).movedim(-1, 1)


@register
class Project(nn.Module):
    """Image stem that projects each pixel to `dim` channels with a 1 x 1 convolution, for one token per pixel.

    Example:
        >>> pc.adapters.Project(3, dim=16)(torch.rand(2, 3, 5, 7)).shape
        torch.Size([2, 16, 5, 7])

    Reference: Jaegle et al. 2022 (Perceiver IO), ImageNet model with learned positions (dim=256).
    """

    def __init__(self, num_channels: int, *, dim: int) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels, dim=dim)
        self.dim, self.stride = dim, (1, 1)
        self.convolution = _convolution(num_channels, dim, kernel=1, stride=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Return the projected pixels."""
        return self.convolution(x)


@register
class ConvStem(nn.Module):
    """Image stem with a 7 x 7 convolution, batch norm, ReLU and 3 x 3 max pooling, for one token per 4 x 4 pixels.

    As in the published code, the convolution and the pooling have stride 2 and TensorFlow's "SAME" padding. Each halves
    the height and width, rounding up. If the total padding of an axis is odd, the extra pixel is at the end.

    Example:
        >>> pc.adapters.ConvStem(3, dim=64)(torch.rand(2, 3, 224, 113)).shape
        torch.Size([2, 64, 56, 29])

    Reference: deepmind-research/perceiver/io_processors.py, `Conv2DDownsample`.
    """

    def __init__(self, num_channels: int, *, dim: int = 64) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels, dim=dim)
        self.dim, self.stride = dim, (4, 4)
        self.convolution = _convolution(num_channels, dim, kernel=7, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """Return a feature map. Its height and width are a quarter of the image's, rounded up."""
        x = F.relu(self.norm(self.convolution(_pad_same(x, kernel=7, fill=0.0))))
        return F.max_pool2d(_pad_same(x, kernel=3, fill=-torch.inf), kernel_size=3, stride=2)


@register
class SymmetricPadConvStem(ConvStem):
    """Variant of `ConvStem` that pads like transformers: 3 pixels on each side of the image.

    There is no padding before the pooling. A 224 x 224 image is converted to 55 x 55 tokens instead of 56 x 56.

    Example:
        >>> pc.adapters.SymmetricPadConvStem(3, dim=64)(torch.rand(2, 3, 224, 113)).shape
        torch.Size([2, 64, 55, 28])

    Reference: transformers, modeling_perceiver.py, `Conv2DDownsample`.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """Return a feature map with one row and one column fewer than `ConvStem` returns."""
        x = F.relu(self.norm(self.convolution(F.pad(x, (3, 3, 3, 3)))))
        return F.max_pool2d(x, kernel_size=3, stride=2)


def _convolution(num_channels: int, dim: int, *, kernel: int, stride: int, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(num_channels, dim, kernel, stride, bias=bias)
    init.fan_in_(layer.weight, num_channels * kernel * kernel)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _pad_same(x: Tensor, *, kernel: int, fill: float) -> Tensor:
    """Apply TensorFlow's "SAME" padding for a layer of stride 2, whose output size is then ceil(size / 2)."""
    pads: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = kernel - 2 + size % 2
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=fill)
