"""Head that reshapes decoder outputs to an array on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register


@partial(register, name="heads.Grid")
class Grid(nn.Module):
    """Head that reshapes decoder outputs, one per grid point, to an array such as an optical flow, image or video.

    If only selected grid points are decoded, the outputs are not reshaped.

    Args:
        grid: Grid size; None to use the grid size of the queries, which `PerceiverIO` passes to `forward`.
        head: Head to apply to the outputs before reshaping, such as `Linear`; none by default.
        scale: Factor that multiplies all values. Perceiver IO uses 0.01 for optical flow.
        channel_axis: Channel axis of the array: 1 for images `b c h w`, 2 for videos `b t c h w`, -1 for channels-last.

    Example:
        >>> flow = pc.heads.Grid((5, 7), scale=0.01)
        >>> flow(torch.randn(2, 35, 2)).shape, flow(torch.randn(2, 11, 2), query_inputs=torch.arange(11)).shape
        (torch.Size([2, 2, 5, 7]), torch.Size([2, 11, 2]))
        >>> video = pc.heads.Grid((3, 5, 7), head=pc.heads.Linear(32, out_dim=3), channel_axis=2)
        >>> video(torch.randn(2, 105, 32)).shape
        torch.Size([2, 3, 3, 5, 7])

    Reference: deepmind-research/perceiver/perceiver.py, `FlowDecoder`.
    """

    needs_query_layout = True

    def __init__(
        self, grid: Sequence[int] | None, *, head: nn.Module | None = None, scale: float = 1.0, channel_axis: int = 1
    ) -> None:
        super().__init__()
        if grid is not None:
            checks.positive(**{f"grid[{i}]": size for i, size in enumerate(grid)})
            _check_channel_axis(channel_axis, len(grid))
        self.grid, self.scale, self.channel_axis = None if grid is None else tuple(grid), scale, channel_axis
        self.head = nn.Identity() if head is None else head
        self.dim = getattr(head, "dim", None)

    def forward(
        self, outputs: Float[Tensor, "b q d"], *, query_inputs: object = None, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b ..."]:
        """Return the array, or the outputs `b q c` if only selected grid points are decoded.

        Args:
            outputs: Decoder outputs, one per grid point or selected grid point.
            query_inputs: Any value other than None if only selected grid points are decoded, usually their indices.
                None if all grid points are decoded.
            grid: Grid size of the queries; None to use the grid size of this head.

        Raises:
            ValueError: If neither this head nor the queries have a grid size, or if their grid sizes differ.
            ValueError: If all grid points are decoded and the number of outputs is not the number of grid points.
        """
        values = self.head(outputs) * self.scale
        if query_inputs is not None:
            return values
        size = self.grid if grid is None else tuple(grid)
        if size is None:
            raise ValueError("grid must be passed to Grid or with the outputs, since the queries have none")
        if self.grid not in (None, size):
            raise ValueError(
                f"outputs are on a grid {size}, and this head makes {self.grid}. Build it with grid=None for any grid, "
                "or take queries on its grid: queries.Grid(grid, positions)"
            )
        _check_channel_axis(self.channel_axis, len(size))
        if values.ndim != 3 or values.shape[1] != prod(size):
            raise ValueError(
                f"outputs must be b {prod(size)} c, one for each point of {size}, unless `query_inputs` selects "
                f"points; got shape {tuple(outputs.shape)}"
            )
        return values.reshape(values.shape[0], *size, values.shape[-1]).movedim(-1, self.channel_axis)


def _check_channel_axis(channel_axis: int, num_axes: int) -> None:
    if channel_axis != -1 and not 1 <= channel_axis <= num_axes + 1:
        raise ValueError(
            f"channel_axis must be an axis of an array b ... of {num_axes} grid axes and a channel axis; "
            f"got {channel_axis}"
        )
