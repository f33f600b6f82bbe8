"""Channels-last arrays on a grid, and functions that all grid adapters share."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Grid(nn.Module):
    """Adapter for channels-last arrays `b *grid c`: one token per grid point.

    Args:
        num_channels: Number of channels c.
        positions: Position features; None for tokens without positions (a set).

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> positions = pc.positions.Fourier(num_axes=3, num_bands=4, max_resolution=16)
        >>> video = pc.adapters.Grid(num_channels=3, positions=positions)
        >>> tokens = video(torch.rand(2, 5, 7, 11, 3))
        >>> tokens.num_tokens, tokens.dim == video.dim
        (385, True)
    """

    def __init__(self, num_channels: int, *, positions: Positions | None) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels)
        self.num_channels, self.positions = num_channels, positions
        self.dim = token_dim(num_channels, positions)

    def forward(self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, " b *grid"] | None = None) -> Tokens:
        """Return the tokens of arrays."""
        checks.is_floating("array", x)
        axes = 1 if self.positions is None else self.positions.num_axes
        if x.ndim != axes + 2 and (self.positions is not None or x.ndim < 3):
            raise ValueError(f"array must be b *grid c with {axes} grid axes; got shape {tuple(x.shape)}")
        checks.not_empty("array", x)
        checks.has_channels("array", x, x.ndim - 1, self.num_channels)
        return grid_tokens("array", x, self.positions, mask)


def token_dim(num_channels: int, positions: Positions | None) -> int:
    """Return the width of tokens with `num_channels` of content and these positions."""
    return num_channels + (0 if positions is None else positions.dim)


def grid_tokens(name: str, content: Tensor, positions: Positions | None, mask: Tensor | None) -> Tokens:
    """Return tokens of channels-last content, after a check of its values and mask."""
    if mask is not None:
        checks.is_mask("mask", mask, content.shape[:-1])
    checks.values(name, content, mask)
    tables = () if positions is None else positions.tables(tuple(content.shape[1:-1]), like=content)
    return Tokens(content, tables, mask)


def check_axes(adapter: str, positions: Positions | None, num_axes: int) -> None:
    """Raise unless positions are None, or an object with tables over `num_axes` axes.

    Raises:
        TypeError: Something else, a class for example.
        ValueError: Another number of axes.
    """
    if positions is None:
        return
    if isinstance(positions, type) or not isinstance(positions, Positions):
        raise TypeError(
            f"positions of {adapter} must have dim, num_axes and tables, as positions.Fourier(num_axes={num_axes}) "
            f"has; got {positions!r}"
        )
    if positions.num_axes != num_axes:
        raise ValueError(f"positions of {adapter} must have {num_axes} axes; got {positions.num_axes}")
