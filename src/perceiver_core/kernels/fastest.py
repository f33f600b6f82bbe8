"""The default attention kernel: the fastest of this package for its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_core import checks
from perceiver_core.kernels.chunked import chunked
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values
from perceiver_core.kernels.sdpa import sdpa
from perceiver_core.masks import Mask
from perceiver_core.registry import register

CHUNK_SIZE = 1024  # keys; the scores of a chunk should stay in the processor's cache
MIN_MULTIPLICATIONS = 2**25  # of queries and keys; below, PyTorch's kernel has less overhead


@register
def fastest(q: Queries, k: Keys, v: Values, *, mask: Mask | None = None, dropout: float = 0.0) -> Outputs:
    """Compute attention by `sdpa`, or by `chunked` for bfloat16 inputs on a CPU with bfloat16 matrix units.

    On such processors PyTorch's fused kernel is no faster in bfloat16 than in float32, and matrix products are several
    times faster. `chunked` then rounds scores to bfloat16, as dense attention in bfloat16 does, which adds about as
    much error as the rounding of queries and keys; `kernel=sdpa` keeps scores in float32.

    Arguments and result are those of `sdpa`.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(pc.kernels.fastest(q, k, v), pc.kernels.reference(q, k, v))
    """
    if uses_chunks(q, k.shape[-2], dropout=dropout):
        half = (x.to(torch.bfloat16) for x in (q, k, v))
        return chunked(*half, mask=mask, chunk_size=CHUNK_SIZE, half_precision_matmul=True)
    return sdpa(q, k, v, mask=mask, dropout=dropout)


def uses_chunks(q: Tensor, num_keys: int, *, dropout: float = 0.0) -> bool:
    """Return whether `fastest` uses `chunked` for these queries and this number of keys.

    Never under torch.compile and torch.export: the choice depends on sizes that may vary, and on the machine.
    """
    if q.device.type != "cpu" or dropout or torch.compiler.is_compiling():
        return False
    enough = q.numel() * num_keys >= MIN_MULTIPLICATIONS
    return enough and checks.product_dtype(q) == torch.bfloat16 and has_bfloat16_units()


def has_bfloat16_units() -> bool:
    """Return whether this is an x86 processor with units that multiply bfloat16 matrices without emulation."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
