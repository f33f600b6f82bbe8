"""Any channels-last array on a grid, and the step that all grid adapters end with."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Grid(nn.Module):
    """Arrays `b *grid c` of as many axes as its positions have: one token a grid point.

    Args:
        num_channels: c.
        positions: position features; None for tokens that do not know where they are (a set).

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> video = pc.adapters.Grid(num_channels=3, positions=pc.positions.Fourier(num_axes=3, num_bands=4, max_resolution=16))
        >>> tokens = video(torch.rand(2, 5, 7, 11, 3))
        >>> tokens.num_tokens, tokens.dim == video.dim
        (385, True)
    """

    def __init__(self, num_channels: int, *, positions: Positions | None) -> None:
        super().__init__()
        checks.positive(num_channels=num_channels)
        self.num_channels, self.positions = num_channels, positions

    @property
    def dim(self) -> int:
        """The width of a token."""
        return token_dim(self.num_channels, self.positions)

    def forward(self, x: Float[Tensor, "b *grid c"], *, mask: Bool[Tensor, " b *grid"] | None = None) -> Tokens:
        """The tokens of an array.

        Raises:
            TypeError: an array that is not floating point.
            ValueError: another rank or number of channels, an empty array, NaN.
        """
        checks.is_floating("array", x)
        axes = 1 if self.positions is None else self.positions.num_axes
        if x.ndim != axes + 2 and (self.positions is not None or x.ndim < 3):
            raise ValueError(f"array must be b *grid c with {axes} grid axes; got shape {tuple(x.shape)}")
        checks.not_empty("array", x)
        checks.has_channels("array", x, x.ndim - 1, self.num_channels)
        return grid_tokens("array", x, self.positions, mask)


def token_dim(channels: int, positions: Positions | None) -> int:
    """The width of tokens with `channels` of content and these positions."""
    return channels + (0 if positions is None else positions.dim)


def grid_tokens(name: str, content: Tensor, positions: Positions | None, mask: Tensor | None) -> Tokens:
    """Tokens of channels-last content, its values checked.

    Raises:
        TypeError, ValueError: see `checks.is_mask` and `checks.values`.
    """
    if mask is not None:
        checks.is_mask("mask", mask, content.shape[:-1])
    checks.values(name, content, mask)
    tables = () if positions is None else positions.tables(tuple(content.shape[1:-1]), like=content)
    return Tokens(content, tables, mask)


def check_axes(adapter: str, positions: Positions | None, axes: int) -> None:
    """Raises unless positions are an object with tables over `axes` axes.

    Raises:
        TypeError: something else, a class for example.
        ValueError: another number of axes.
    """
    if positions is None:
        return
    if isinstance(positions, type) or not isinstance(positions, Positions):
        raise TypeError(
            f"positions of {adapter} must have dim, axes and tables, as positions.Fourier(axes={axes}) has; "
            f"got {positions!r}"
        )
    if positions.num_axes != axes:
        raise ValueError(f"positions of {adapter} must have {axes} axes; got {positions.num_axes}")
