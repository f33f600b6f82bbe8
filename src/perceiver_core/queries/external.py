"""Query modules for queries passed by the caller, as vectors or as points."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions.grid import PointFeatures, check_takes_points
from perceiver_core.registry import register


@register
class External(nn.Module):
    """Query module that returns query vectors passed by the caller. `dim` is their width.

    Example:
        >>> source = pc.queries.External(32)
        >>> source(queries=torch.randn(100, 32)).shape, source(queries=torch.randn(2, 100, 32)).shape
        (torch.Size([1, 100, 32]), torch.Size([2, 100, 32]))
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim)
        self.dim = dim

    def forward(self, tokens: object = None, queries: Float[Tensor, "*b q e"] | None = None) -> Float[Tensor, "#b q e"]:
        """Return the queries, with a batch axis.

        Args:
            tokens: Not used.
            queries: Query vectors `b q e`, or `q e` to use the same queries for all samples.
        """
        return _batched("queries", queries, self.dim)


@register
class Coordinates(nn.Module):
    """Query module that returns the position encoding of points passed by the caller.

    `positions` is a callable that maps points `*b axes` to features `*b dim`, such as `positions.Fourier`. It must have
    the attributes `num_axes` and `dim`.

    Example:
        >>> source = pc.queries.Coordinates(pc.positions.Fourier(num_axes=2, num_bands=8))
        >>> source(points=torch.rand(3, 100, 2) * 2 - 1).shape
        torch.Size([3, 100, 34])
    """

    def __init__(self, positions: PointFeatures) -> None:
        super().__init__()
        check_takes_points(positions)
        self.positions, self.dim = positions, int(positions.dim)

    def forward(
        self, tokens: object = None, points: Float[Tensor, "*b q axes"] | None = None
    ) -> Float[Tensor, "#b q e"]:
        """Return the position encoding of the points, with a batch axis.

        Args:
            tokens: Not used.
            points: Coordinates in [-1, 1]: `b q axes`, or `q axes` to use the same points for all samples.
        """
        return self.positions(_batched("points", points, self.positions.num_axes))


def _batched(name: str, x: Tensor | None, width: int) -> Float[Tensor, "#b q e"]:
    """Check that `x` is a floating-point tensor `q width` or `b q width`, and return it with a batch axis."""
    if x is None:
        raise ValueError(f"{name} must be q {width} or b q {width}; got None. Pass them with each call")
    checks.is_floating(name, x)
    if x.ndim not in (2, 3) or x.shape[-1] != width:
        raise ValueError(f"{name} must be q {width} or b q {width}; got shape {tuple(x.shape)}")
    return x[None] if x.ndim == 2 else x
