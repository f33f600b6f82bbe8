"""Functions that cut arrays with any number of axes into flattened patches, and assemble arrays from patches.

The values of a patch are in row-major order, with the channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def patchify(x: Float[Tensor, "b c *axes"], patch_size: Sequence[int]) -> Float[Tensor, "b *grid p"]:
    """Cut arrays into flattened patches, after zero-padding the end of each axis to a multiple of the patch size."""
    # Computed without the padded sizes: torch.export cannot infer that these are multiples of the patch size.
    counts = [(size + patch - 1) // patch for size, patch in zip(x.shape[2:], patch_size, strict=True)]
    pads = [(0, n * patch - size) for n, patch, size in zip(counts, patch_size, x.shape[2:], strict=True)]
    x = F.pad(x, [pad for axis in reversed(pads) for pad in axis])
    x = x.reshape(*x.shape[:2], *(part for n, patch in zip(counts, patch_size, strict=True) for part in (n, patch)))
    return x.permute(0, *range(2, x.ndim, 2), *range(3, x.ndim, 2), 1).flatten(1 + len(patch_size))


def unpatchify(
    patches: Float[Tensor, "b *grid p"], patch_size: Sequence[int], channel_axis: int = 1
) -> Float[Tensor, "b ..."]:
    """Assemble arrays from flattened patches (inverse of `patchify`).

    `channel_axis` is the channel axis of the result: 1 for `b c *axes`, 2 for `b t c h w`.
    """
    batch, *grid, width = patches.shape
    n = len(grid)
    x = patches.reshape(batch, *grid, *patch_size, width // prod(patch_size))
    order = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]
    order.insert(2 * (channel_axis - 1), 2 * n + 1)
    sizes = [size * patch for size, patch in zip(grid, patch_size, strict=True)]
    sizes.insert(channel_axis - 1, x.shape[-1])
    return x.permute(0, *order).reshape(batch, *sizes)
