"""Structured reads: exact cross-attention over a grid of tokens, without computing keys and values."""

from perceiver_core.kernels.grid.interface import GridFallbackWarning
from perceiver_core.kernels.grid.operator import GridRead, missing_kernel, read_grid

__all__ = ["GridFallbackWarning", "GridRead", "missing_kernel", "read_grid"]
