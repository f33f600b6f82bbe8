"""Arrays: one decoder output for every point of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register


@partial(register, name="heads.Grid")
class Grid(nn.Module):
    """An answer for every point of a grid, as an array: flow, pixels, depth, frames of a film.

    Args:
        grid: its size; None for the one that was asked on, which a `PerceiverIO` says.
        head: what is done to each answer first, such as `Linear`.
        scale: a factor for all values. Perceiver IO's flow is a hundredth of what its decoder gives.
        channel_axis: which axis of the array the values are: 1 for `b c h w`, 2 for films `b t c h w`, -1 for the last.

    Raises:
        ValueError: an axis that the array has not.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> flow = heads.Grid((5, 7), scale=0.01)
        >>> flow(torch.randn(2, 35, 2)).shape, flow(torch.randn(2, 11, 2), query_inputs=torch.arange(11)).shape
        (torch.Size([2, 2, 5, 7]), torch.Size([2, 11, 2]))
        >>> film = heads.Grid((3, 5, 7), head=heads.Linear(32, out_dim=3), channel_axis=2)
        >>> film(torch.randn(2, 105, 32)).shape
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
            _check_axis(channel_axis, len(grid))
        self.grid, self.scale, self.channel_axis = None if grid is None else tuple(grid), scale, channel_axis
        self.head = nn.Identity() if head is None else head
        if hasattr(self.head, "dim"):
            self.dim = self.head.dim

    def forward(
        self, answers: Float[Tensor, "b q d"], *, query_inputs: Any = None, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b ..."]:
        """The array, or `b q c` for some of the points.

        Args:
            answers: one a point.
            query_inputs: which points were asked for; all of the grid unless given.
            grid: the one that was asked on, where that is known.

        Raises:
            ValueError: answers on another grid, or another number of them than it has points.
        """
        values: Tensor = self.head(answers) * self.scale
        if query_inputs is not None:
            return values
        size = self._size(grid)
        if values.ndim != 3 or values.shape[1] != prod(size):
            raise ValueError(
                f"answers must be b {prod(size)} c, one for each point of {size}, where `query_inputs` does not say "
                f"which points were asked for; got shape {tuple(answers.shape)}"
            )
        return values.reshape(values.shape[0], *size, values.shape[-1]).movedim(-1, self.channel_axis)

    def _size(self, asked: Sequence[int] | None) -> tuple[int, ...]:
        if asked is None and self.grid is None:
            raise ValueError("grid must be given, to Grid or with the answers, where queries do not tell it")
        if asked is not None and self.grid is not None and tuple(asked) != self.grid:
            raise ValueError(
                f"answers are on a grid {tuple(asked)}, and this head makes {self.grid}. Give it None to take any, "
                "or ask on its grid: queries.Grid(grid, positions)"
            )
        size = tuple(asked) if self.grid is None and asked is not None else self.grid
        assert size is not None
        _check_axis(self.channel_axis, len(size))
        return size


def _check_axis(channel_axis: int, axes: int) -> None:
    if channel_axis != -1 and not 1 <= channel_axis <= axes + 1:
        raise ValueError(
            f"channel_axis must be an axis of an array b ... of {axes} axes and one for them; got {channel_axis}"
        )
