"""Learned position encodings: embeddings of indices, embeddings of grid points, and projections of other encodings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, tracing
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.positions.grid import Positions, check_axes, spanned_axes
from perceiver_core.registry import register


@register
class LearnedEmbedding(nn.Module):
    """Learned position embedding of shape (length, dim): token i gets vector i, for any input length up to `length`.

    Use it for video frames and for sequences that grow by one token at a time. For images, use `LearnedGrid`, which
    interpolates its embedding to other input sizes.

    Example:
        >>> positions = pc.positions.LearnedEmbedding(100, dim=32)
        >>> positions(torch.tensor([2, 0, 5])).shape, positions.tables((7,), like=torch.zeros(()))[0].shape
        (torch.Size([3, 32]), torch.Size([7, 32]))

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `position_embeddings` of the style "random";
    open_flamingo and flamingo-pytorch, `PerceiverResampler`.
    """

    _called_with = "indices"

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        checks.positive(length=length, dim=dim)
        self.num_axes, self.length, self.dim = 1, length, dim
        self.vectors = init.embedding(length, dim)

    def forward(self, positions: Int[Tensor, "*b n"]) -> Float[Tensor, "*b n d"]:
        """Return the vectors at these indices. The range of the indices is checked on the CPU in eager mode only."""
        checks.below("positions", positions, self.length)
        # Indices on the meta device have no values; with a weight on another device, PyTorch would return garbage.
        return F.embedding(positions, self.vectors.to("meta") if positions.is_meta else self.vectors)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "n p"], ...]:
        """Return a tuple with a single position table: the first `grid[0]` vectors.

        Raises:
            ValueError: If the grid has more than `length` tokens.
        """
        check_axes(grid, self.num_axes, like)
        if grid[0] > self.length:
            raise ValueError(
                f"grid must have at most length={self.length} tokens; got {grid[0]}. Build LearnedEmbedding with a "
                "larger length, or use LearnedGrid, which resamples"
            )
        return (self(torch.arange(grid[0], device=like.device)).to(like.dtype),)


@register
class LearnedGrid(nn.Module):
    """Learned position embedding of width `dim` for every point of a grid with one, two or three axes.

    `grid` is usually the grid size in training. For other input sizes, the embedding is interpolated: linear for one
    axis, bicubic for two axes, trilinear for three axes, always with `align_corners=True`.

    Example:
        >>> pc.positions.LearnedGrid((14, 14), dim=32).tables((11, 17), like=torch.zeros(()))[0].shape
        torch.Size([11, 17, 32])

    Reference: deepmind-research/perceiver/position_encoding.py, `TrainablePositionEncoding`.
    """

    _called_with = "grid"

    def __init__(self, grid: Sequence[int], dim: int) -> None:
        super().__init__()
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid must have one to three axes; got {tuple(grid)}")
        check_axes(grid, len(grid))
        checks.positive(dim=dim)
        self.num_axes, self.dim = len(grid), dim
        self.spanned_axes = (True,) * len(grid)
        self.vectors = init.embedding(*grid, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "*grid p"], ...]:
        """Return a tuple with a single position table: the embedding, interpolated to size `grid`."""
        return (self(grid, like.detach()),)

    def forward(self, grid: Sequence[int], like: Tensor) -> Float[Tensor, "*grid p"]:
        """Return the embedding, interpolated to size `grid`, in the dtype of `like`."""
        check_axes(grid, self.num_axes, like)
        if all(tracing.always(size == own) for size, own in zip(grid, self.vectors.shape[:-1], strict=True)):
            return self.vectors.to(like.dtype, copy=True)  # never return the parameter itself
        mode = ("linear", "bicubic", "trilinear")[self.num_axes - 1]
        channels_first = torch.movedim(self.vectors, -1, 0)[None]
        resampled = F.interpolate(channels_first, size=tuple(grid), mode=mode, align_corners=True)
        return torch.movedim(resampled[0], 0, -1).to(like.dtype)


@register
class Projected(nn.Module):
    """Linear projection of position features to width `dim`, applied to the position tables instead of to every token.

    Example:
        >>> positions = pc.positions.Projected(pc.positions.LearnedGrid((14, 14), dim=32), dim=256)
        >>> positions.tables((14, 14), like=torch.zeros(()))[0].shape
        torch.Size([14, 14, 256])

    Reference: deepmind-research/perceiver, `project_pos_dim`; Perceiver IO's ImageNet model with learned positions.
    """

    _called_with = "grid"

    def __init__(self, positions: Positions, dim: int) -> None:
        super().__init__()
        if not isinstance(positions, Positions):
            raise TypeError(f"positions must have dim, num_axes and tables, as Fourier has; got {positions!r}")
        checks.positive(dim=dim)
        self.positions, self.dim, self.num_axes = positions, dim, positions.num_axes
        self.spanned_axes = spanned_axes(positions)
        self.project = init.linear(positions.dim, dim)

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """Return the projected position tables. Only the first includes the bias, so their sum includes it once."""
        check_axes(grid, self.num_axes, like)
        return self(grid, like.detach())  # call the module, so that hooks and FSDP run

    def forward(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """Return the projected position tables. Only the first includes the bias, so their sum includes it once."""
        weight = self.project.weight  # in a quantized layer, `weight` is a method, and the input must be float32
        dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
        dtype = like.dtype if checks.converts(self.project) else dtype  # its hooks convert the weight or the input
        first, *others = (table.to(dtype) for table in self.positions.tables(grid, like))
        projected = [apply_linear(self.project, first)]
        if others:
            bias = self.project(torch.zeros_like(first).flatten(0, -2)[:1])
            projected += [apply_linear(self.project, table) - bias for table in others]
        return tuple(table.to(like.dtype) for table in projected)
