"""Position encodings: Fourier features of coordinates in [-1, 1], learned embeddings and rotary embeddings."""

from perceiver_core.positions.fixed_grid import FixedGrid
from perceiver_core.positions.fourier import Fourier, FourierPerAxis, Gaussian, NeRF
from perceiver_core.positions.grid import Positions, coordinates, grid_points
from perceiver_core.positions.learned import LearnedEmbedding, LearnedGrid, Projected
from perceiver_core.positions.rotary import Rotary, half_open_exponents, inclusive_exponents

__all__ = [
    "FixedGrid",
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
