"""Position encoding in fixed units: padding an input does not change the positions of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions.fourier import Gaussian, SeparableFeatures
from perceiver_core.positions.grid import Positions, check_axes, spanned_axes
from perceiver_core.registry import register


@register
class FixedGrid(nn.Module):
    """Position encoding of a fixed grid: token i has the position of grid point i, for every input size.

    Without this wrapper, positions span the input: the last token has coordinate 1, however many tokens there are. This
    suits images of different resolutions. For inputs in which a token stands for a fixed duration or distance, such as
    audio, the position of a token should not depend on the end of the input. With `FixedGrid`, an input has the same
    positions by itself and padded in a batch.

    Args:
        positions: Position encoding to wrap, such as `positions.Fourier` or `positions.LearnedGrid`.
        grid: Number of tokens that span the coordinates from -1 to 1, one number per axis, usually the size of the
            longest input. None for an axis along which each input spans these coordinates, whatever its size.

    With `Fourier`, `FourierPerAxis`, `NeRF` and `Gaussian`, inputs may have more tokens than `grid`: the coordinates of
    these tokens exceed 1. With all other position encodings, such inputs raise ValueError.

    Raises:
        TypeError: If `positions` does not implement `positions.Positions`.
        ValueError: If `grid` does not have one size per axis.

    Example:
        >>> fourier = pc.positions.Fourier(num_axes=1, num_bands=8, max_resolution=100)
        >>> positions = pc.positions.FixedGrid(fourier, grid=(100,))
        >>> (short,), (long,) = (positions.tables((n,), like=torch.zeros(())) for n in (40, 60))
        >>> torch.equal(short, long[:40])
        True
    """

    def __init__(self, positions: Positions, grid: Sequence[int | None]) -> None:
        super().__init__()
        if isinstance(positions, type) or not isinstance(positions, Positions):
            raise TypeError(f"positions must have dim, num_axes and tables, as Fourier has; got {positions!r}")
        if not isinstance(grid, Sequence) or len(grid) != positions.num_axes:
            raise ValueError(f"grid must have one size for each of {positions.num_axes} axes; got {grid!r}")
        checks.positive(**{f"grid[{axis}]": size for axis, size in enumerate(grid) if size is not None})
        self.positions, self.grid = positions, tuple(grid)
        self.dim, self.num_axes = positions.dim, positions.num_axes

    @property
    def spanned_axes(self) -> tuple[bool, ...]:
        """One flag per axis, True if positions depend on the input size."""
        axes = spanned_axes(self.positions)
        return tuple([size is None and spanned for size, spanned in zip(self.grid, axes, strict=False)])

    def tables(self, grid: Sequence[int], like: Tensor) -> tuple[Float[Tensor, "... p"], ...]:
        """Return the position tables for an input of size `grid`, with the dtype and device of `like`.

        Raises:
            ValueError: If the input is larger than the fixed grid, and the wrapped encoding has no positions beyond it.
        """
        check_axes(grid, self.num_axes, like)
        reference = tuple([size if fixed is None else fixed for size, fixed in zip(grid, self.grid, strict=True)])
        if isinstance(self.positions, (SeparableFeatures, Gaussian)):
            return self.positions.tables(grid, like, reference=reference)
        if any(size > full for size, full in zip(grid, reference, strict=True)):
            raise ValueError(
                f"grid must be at most {reference}, the grid of FixedGrid; got {tuple(grid)}. Build both with a larger "
                f"grid: {type(self.positions).__name__} has no positions beyond it"
            )
        tables = self.positions.tables(reference, like)
        return tuple([table[tuple([slice(size) for size in grid])] for table in tables])

    def extra_repr(self) -> str:
        """Return the settings to show in `repr`."""
        return f"grid={self.grid}"
