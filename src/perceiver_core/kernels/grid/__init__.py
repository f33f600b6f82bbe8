"""Exact reads of a position-encoded grid that form no keys and no values."""

from perceiver_core.kernels.grid.operator import GridRead, read_grid

__all__ = ["GridRead", "read_grid"]
