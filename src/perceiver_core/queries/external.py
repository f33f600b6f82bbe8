"""Queries that are passed with each call: vectors, or points whose position features are the queries."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.positions.grid import PointFeatures, check_takes_points
from perceiver_core.registry import register


@register
class External(nn.Module):
    """Queries of width `dim` that are passed with each call and returned unchanged.

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
        """Return the queries, `q e` for all samples or `b q e`; `tokens` are not used."""
        return _batched("queries", queries, self.dim)


@register
class Coordinates(nn.Module):
    """Queries that are the position features of points, which are passed with each call.

    `positions` are any callable from points `*b axes` to features with `num_axes` and `dim`, such as
    `positions.Fourier`.

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
        """Return the features of points in [-1, 1], `q axes` for all samples or `b q axes`; `tokens` are not used."""
        return self.positions(_batched("points", points, self.positions.num_axes))


def _batched(name: str, x: Tensor | None, width: int) -> Float[Tensor, "#b q e"]:
    """Return vectors with an axis of samples; raise unless they are `q e` or `b q e` of this width."""
    if x is None:
        raise ValueError(f"{name} must be q {width} or b q {width}; got None. Pass them with each call")
    checks.is_floating(name, x)
    if x.ndim not in (2, 3) or x.shape[-1] != width:
        raise ValueError(f"{name} must be q {width} or b q {width}; got shape {tuple(x.shape)}")
    return x[None] if x.ndim == 2 else x
