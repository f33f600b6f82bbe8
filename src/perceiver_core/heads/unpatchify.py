"""Images and videos from patches: every decoder output is one patch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.heads.grid import Grid
from perceiver_core.heads.linear import Linear
from perceiver_core.registry import register


@register
class Unpatchify(nn.Module):
    """Every answer is a patch of a picture `b c h w`, or of a film `b t c h w`.

    Args:
        dim: the width of an answer.
        grid: how many patches there are along each axis; None for the grid that was asked on.
        patch_size: how many pixels a patch has along each axis.
        num_channels: of a pixel.

    Raises:
        ValueError: another number of axes than two or three.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> pictures = heads.Unpatchify(32, grid=(4, 5), patch_size=(2, 3), num_channels=3)
        >>> pictures(torch.randn(2, 20, 32)).shape
        torch.Size([2, 3, 8, 15])
        >>> some = torch.tensor([0, 19])
        >>> pictures(torch.randn(2, 2, 32), query_inputs=some).shape
        torch.Size([2, 2, 18])
        >>> pictures.cut(torch.rand(2, 3, 8, 15))[:, some].shape
        torch.Size([2, 2, 18])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3, reads films as patches; deepmind-research/perceiver,
    io_processors.py, `reverse_space_to_depth`.
    """

    needs_query_layout = True

    def __init__(
        self, dim: int, *, grid: Sequence[int] | None, patch_size: Sequence[int], num_channels: int = 3
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, num_channels=num_channels, **{f"patch_size[{i}]": n for i, n in enumerate(patch_size)})
        if len(patch_size) not in (2, 3):
            raise ValueError(f"patch_size must have two axes, of pictures, or three, of films; got {tuple(patch_size)}")
        if grid is not None and len(grid) != len(patch_size):
            raise ValueError(f"grid must have as many axes as patch_size, {len(patch_size)}; got {tuple(grid)}")
        self.dim, self.patch_size, self.num_channels = dim, tuple(patch_size), num_channels
        values = Linear(dim, num_channels * prod(patch_size))
        self.patches = Grid(grid, head=values, channel_axis=-1)

    def forward(
        self, answers: Float[Tensor, "b q d"], *, query_inputs: Any = None, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b ..."]:
        """The pictures or films; or for some of the patches, in the layout of `cut`, their pixels."""
        found: Tensor = self.patches(answers, query_inputs=query_inputs, grid=grid)
        return found if query_inputs is not None else self._joined(found)

    def _joined(self, patches: Tensor) -> Tensor:
        sizes = dict(zip("tpq"[-len(self.patch_size) :], self.patch_size, strict=True))
        if len(self.patch_size) == 2:
            return rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", **sizes, c=self.num_channels)
        return rearrange(patches, "b f h w (t p q c) -> b (f t) c (h p) (w q)", **sizes, c=self.num_channels)

    def cut(self, pixels: Float[Tensor, "b ..."]) -> Float[Tensor, "b n values"]:
        """Pictures or films as patches, one a query: what answers to some of them are to be compared with.

        Raises:
            ValueError: pixels that are no whole number of patches, or of another number of channels or axes.
        """
        axes = len(self.patch_size)
        letters = "b c h w" if axes == 2 else "b t c h w"
        checks.has_shape("pixels", pixels, letters)
        sides = pixels.shape[2:] if axes == 2 else (pixels.shape[1], *pixels.shape[3:])
        if pixels.shape[-3] != self.num_channels or any(n % of for n, of in zip(sides, self.patch_size, strict=True)):
            raise ValueError(
                f"pixels must be {letters} of {self.num_channels} channels and whole patches {self.patch_size}; "
                f"got shape {tuple(pixels.shape)}"
            )
        sizes = dict(zip("tpq"[-axes:], self.patch_size, strict=True))
        if axes == 2:
            return rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", **sizes)
        return rearrange(pixels, "b (f t) c (h p) (w q) -> b (f h w) (t p q c)", **sizes)
