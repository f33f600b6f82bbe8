"""Position features of tokens and queries, on coordinates in [-1, 1]."""

from perceiver_core.positions.fourier import Fourier, FourierPerAxis, Gaussian, NeRF
from perceiver_core.positions.grid import Positions, coordinates, grid_points
from perceiver_core.positions.learned_embedding import LearnedEmbedding
from perceiver_core.positions.learned_grid import LearnedGrid
from perceiver_core.positions.projected import Projected
from perceiver_core.positions.rotary import Rotary, half_open_exponents, inclusive_exponents

__all__ = [
    "Fourier",
    "FourierPerAxis",
    "Gaussian",
    "LearnedEmbedding",
    "LearnedGrid",
    "NeRF",
    "Positions",
    "Projected",
    "Rotary",
    "coordinates",
    "grid_points",
    "half_open_exponents",
    "inclusive_exponents",
]
