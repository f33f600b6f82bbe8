"""Where tokens are: position features for adapters and queries, all on coordinates in [-1, 1]."""

from perceiver_core.positions.fourier import Fourier, FourierPerAxis, Gaussian, NeRF
from perceiver_core.positions.grid import Positions, coordinates, grid_points
from perceiver_core.positions.learned import Learned, LearnedUpTo
from perceiver_core.positions.rotary import Rotary

__all__ = [
    "Fourier",
    "FourierPerAxis",
    "Gaussian",
    "Learned",
    "LearnedUpTo",
    "NeRF",
    "Positions",
    "Rotary",
    "coordinates",
    "grid_points",
]
