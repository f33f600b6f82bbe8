"""Tiling of a structured read on a GPU.

The Triton kernels process every grid as a matrix of tokens. Its columns are the last grid axis, and its rows are all
other grid axes, flattened. The columns are divided into stretches of 16 or 32 columns. Consecutive stretches form a
group, and consecutive rows form a split. A program processes only the tokens in one split and one group, so that even a
few queries occupy the whole GPU (as in flash-decoding).
"""

from __future__ import annotations

import math
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch

from perceiver_core.kernels.grid.interface import GridInputs

Options: TypeAlias = dict[str, Any]

WARP = 32  # threads per warp; the number of queries is padded to a multiple of it
WARPS_PER_PROCESSOR = 24  # target number of warps per streaming multiprocessor (SM)
MAX_INT32 = 2**31 - 1  # the kernels multiply sizes as 32-bit integers
MIN_MATRIX_CHANNELS = 16  # minimum padded channels for tensor cores; fewer channels are multiplied in registers


class Plan(NamedTuple):
    """Sizes of a structured read and the sizes of its tiles."""

    samples: int
    heads: int
    batch_heads: int  # samples times heads
    queries: int  # padded to a multiple of `WARP`
    row_axes: tuple[int, ...]  # sizes of all axes but the last
    height: int  # number of rows, the product of `row_axes`
    width: int  # number of columns, the size of the last axis
    padded_width: int  # `width` padded to a multiple of `stretch`
    stretches: int  # number of stretches
    stretch: int  # columns per stretch
    splits: int  # number of splits of the rows
    groups: int  # number of groups of stretches
    uses_matrix_units: bool
    constants: Options  # compile-time constants of all kernels

    @classmethod
    def of(cls, inputs: GridInputs) -> Plan:
        """Return the plan for inputs of these sizes on this device."""
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
    """Return the number of streaming multiprocessors (SMs) of a GPU, or 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
