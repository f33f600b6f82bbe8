"""Adapter for channels-last arrays, and the base class of adapters for images, audio and video."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.adapters.lengths import Lengths, VariableSize
from perceiver_core.positions import Positions
from perceiver_core.positions.grid import warn_if_padded
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


class GridAdapter(VariableSize, nn.Module):
    """Base class of adapters with one token per grid point.

    A token consists of the channels of the grid point, followed by its position encoding, if there is one.
    `num_axes` is the required number of axes of `positions`; None to accept any number.
    """

    def __init__(self, num_channels: int, positions: Positions | None, *, num_axes: int | None = None) -> None:
        super().__init__()
        if positions is not None:
            if isinstance(positions, type) or not isinstance(positions, Positions):
                raise TypeError(
                    f"positions of {type(self).__name__} must have dim, num_axes and tables, as "
                    f"positions.Fourier(num_axes={num_axes or 2}) has; got {positions!r}"
                )
            if num_axes not in (None, positions.num_axes):
                raise ValueError(
                    f"positions of {type(self).__name__} must have {num_axes} axes; got {positions.num_axes}"
                )
        self.positions = positions
        self.dim = num_channels + (0 if positions is None else positions.dim)

    def _tokens(self, name: str, content: Tensor, mask: Tensor | None) -> Tokens:
        """Convert a channels-last array to tokens with position encodings, after checking its values and the mask.

        `name` is the name of the array in error messages.
        """
        if mask is not None:
            checks.is_mask("mask", mask, content.shape[:-1])
        checks.values(name, content, mask)
        warn_if_padded(self.positions, mask)
        tables = () if self.positions is None else self.positions.tables(tuple(content.shape[1:-1]), like=content)
        for table in tables:
            checks.same_device(name, content, table)
        return Tokens(content, tables, mask)


@register
class Grid(GridAdapter):
    """Adapter for channels-last arrays `b *grid c`: one token per grid point.

    Args:
        num_channels: Number of channels c.
        positions: Position encoding with the same number of axes as the grid; None to treat the tokens as an unordered
            set.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=3, num_bands=4, max_resolution=16)
        >>> video = pc.adapters.Grid(num_channels=3, positions=positions)
        >>> tokens = video(torch.rand(2, 5, 7, 11, 3))
        >>> tokens.num_tokens, tokens.dim == video.dim
        (385, True)
    """

    def __init__(self, num_channels: int, *, positions: Positions | None) -> None:
        checks.positive(num_channels=num_channels)
        super().__init__(num_channels, positions)
        self.num_channels = num_channels

    time_axis = None

    def axes_of(self, ndim: int) -> tuple[int, ...]:
        """Return the grid axes of batches with `ndim` axes, as negative indices."""
        return tuple(range(1 - ndim, -1))

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, " b *grid"] | None = None,
        lengths: Lengths | None = None,
    ) -> Tokens:
        """Convert arrays to tokens.

        Args:
            x: Arrays with the channels last.
            mask: Mask of valid grid points, True = attend.
            lengths: Size of each array before padding: `b axes`, or `b` if there is one axis.
        """
        checks.is_floating("x", x)
        axes = 1 if self.positions is None else self.positions.num_axes
        if x.ndim != axes + 2 and (self.positions is not None or x.ndim < 3):
            raise ValueError(f"x must be b *grid c with {axes} grid axes; got shape {tuple(x.shape)}")
        checks.not_empty("x", x)
        checks.has_channels("x", x, x.ndim - 1, self.num_channels)
        return self._tokens("x", *self._with_lengths(x, mask, lengths))
