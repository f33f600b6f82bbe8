"""Tiling of a structured read on a GPU: the number of parts of the grid that are computed separately.

The kernels know grids of two axes: columns are the last axis, and rows are all other axes as one. Columns are cut into
stretches of a fixed width. Programs read parts of the grid, some rows of a group of stretches, so that a few queries
occupy a whole GPU as well (flash-decoding).
"""

from __future__ import annotations

import math
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch

from perceiver_core.kernels.grid.interface import GridInputs

Options: TypeAlias = dict[str, Any]

WARP = 32  # queries are padded to a multiple of a warp's threads
WARPS_PER_PROCESSOR = 24  # of work, at least, where the grid can be split that far
MAX_INT32 = 2**31 - 1  # the kernels multiply sizes in 32 bits
MIN_MATRIX_CHANNELS = 16  # padded channels from which on products run on matrix units; fewer stay in registers


class Plan(NamedTuple):
    """Sizes of a read and of its parts."""

    samples: int
    heads: int
    batch_heads: int  # samples times heads
    queries: int  # padded to whole warps
    row_axes: tuple[int, ...]  # sizes of the axes but the last
    height: int  # number of rows, the product of `row_axes`
    width: int
    padded_width: int  # columns, padded to whole stretches
    stretches: int
    stretch: int  # columns of a stretch
    splits: int  # of the rows
    groups: int  # of the stretches
    uses_matrix_units: bool
    constants: Options  # compile-time constants of all kernels

    @classmethod
    def of(cls, inputs: GridInputs) -> Plan:
        """Build the plan for the sizes and the device of the inputs."""
        samples, channels, *row_axes, width = inputs.content.shape
        heads, queries = inputs.content_queries.shape[1], -(-inputs.content_queries.shape[2] // WARP) * WARP
        padded_channels = 1 << (channels - 1).bit_length()
        uses_matrix_units = padded_channels >= MIN_MATRIX_CHANNELS
        stretch = 32 if uses_matrix_units else 16
        stretches, height = -(-width // stretch), prod(row_axes)
        work = WARPS_PER_PROCESSOR * num_processors(inputs.content.device) * WARP
        parts = -(-work // (samples * heads * queries))
        groups = min(stretches, -(-parts // min(height, math.isqrt(parts - 1) + 1)), MAX_INT32 // stretches)
        return cls(
            samples=samples,
            heads=heads,
            batch_heads=samples * heads,
            queries=queries,
            row_axes=tuple(row_axes),
            height=height,
            width=width,
            padded_width=stretches * stretch,
            stretches=stretches,
            stretch=stretch,
            splits=min(height, -(-parts // groups), MAX_INT32 // height),
            groups=groups,
            uses_matrix_units=uses_matrix_units,
            constants={
                "CHANNELS": channels,
                "PADDED": padded_channels,
                "SHARED": inputs.content_queries.shape[0] == 1,
                "MASKED": inputs.mask is not None,
                "PRECISION": "ieee" if inputs.content.dtype == torch.float64 else "tf32x3",
            },
        )


def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 on other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
