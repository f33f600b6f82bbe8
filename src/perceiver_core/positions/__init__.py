"""Where tokens are: position features for adapters and queries, all on coordinates in [-1, 1]."""

from perceiver_core.positions.fourier import Fourier, FourierPerAxis, Gaussian, NeRF
from perceiver_core.positions.grid import Positions, coordinates, grid_points
from perceiver_core.positions.indexed import Indexed
from perceiver_core.positions.learned import Learned
from perceiver_core.positions.projected import Projected
from perceiver_core.positions.rotary import Rotary, half_open, inclusive

__all__ = [
    "Fourier",
    "FourierPerAxis",
    "Gaussian",
    "Indexed",
    "Learned",
    "NeRF",
    "Positions",
    "Projected",
    "Rotary",
    "coordinates",
    "grid_points",
    "half_open",
    "inclusive",
]
