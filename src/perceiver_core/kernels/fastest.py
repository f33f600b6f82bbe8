"""Default attention kernel. On CPUs, it calls `chunked` for some inputs, and `sdpa` otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_core import checks, tracing
from perceiver_core.argument_errors import explained
from perceiver_core.kernels.chunked import chunked
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values, reference
from perceiver_core.kernels.sdpa import sdpa
from perceiver_core.masks import Mask
from perceiver_core.registry import register

CHUNK_SIZE = 1024  # keys per chunk, small enough for the scores to fit in the CPU cache
LONG = 2**20  # keys; with more, the rounding error of PyTorch's fused kernel exceeds 2e-4 in float32
LONG_CHUNK_SIZE = 4096  # keys per chunk of long inputs
MIN_MULTIPLICATIONS = 2**25  # with fewer multiplications in q @ k.mT, `sdpa` has less overhead


@register
@explained
def fastest(q: Queries, k: Keys, v: Values, *, mask: Mask | None = None, dropout: float = 0.0) -> Outputs:
    """Compute attention with `chunked` for some inputs on CPUs, and with `sdpa` otherwise.

    `chunked` is used for large bfloat16 inputs on CPUs with bfloat16 instructions, and for more than a million keys.
    With dropout or under torch.compile, `sdpa` is always used. For forward-mode AD and nested torch.func derivatives,
    which PyTorch's fused kernels do not support, `reference` is used.

    On CPUs with bfloat16 instructions, matrix products are several times faster in bfloat16 than in float32, but
    PyTorch's fused kernel is not. `chunked` rounds scores to bfloat16, as attention without a fused kernel does. This
    adds about as much error as rounding the queries and keys. To keep scores in float32, use `kernel=sdpa`. Under
    autocast to bfloat16, float32 inputs count as bfloat16.

    The rounding error of PyTorch's fused kernel on the CPU grows with the number of keys, up to 2 % for ten million
    keys in float32. That of `chunked` does not.

    The arguments are the same as for `sdpa`.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(pc.kernels.fastest(q, k, v), pc.kernels.reference(q, k, v))
    """
    if tracing.needs_more_derivatives():
        return reference(q, k, v, mask=mask, dropout=dropout)
    if uses_chunks(q, k.shape[-2], dropout=dropout):
        half = (x.to(torch.bfloat16) for x in (q, k, v))
        return chunked(*half, mask=mask, chunk_size=CHUNK_SIZE, half_precision_matmul=True)
    if _is_long(q, k, dropout):
        return chunked(q, k, v, mask=mask, chunk_size=LONG_CHUNK_SIZE)
    return sdpa(q, k, v, mask=mask, dropout=dropout)


def uses_chunks(q: Tensor, num_keys: int, *, dropout: float = 0.0) -> bool:
    """Return whether `fastest` uses `chunked` for these queries and this number of keys.

    Always False under torch.compile and torch.export, because the result depends on the CPU and on sizes that may be
    dynamic.
    """
    if q.device.type != "cpu" or dropout or torch.compiler.is_compiling():
        return False
    enough = q.numel() * num_keys >= MIN_MULTIPLICATIONS
    return enough and checks.product_dtype(q) == torch.bfloat16 and has_bfloat16_units()


def _is_long(q: Tensor, k: Tensor, dropout: float) -> bool:
    if torch.compiler.is_compiling() or dropout or q.device.type != "cpu":
        return False
    return k.shape[-2] > LONG and q.dtype != torch.float64


def has_bfloat16_units() -> bool:
    """Return whether the CPU has x86 instructions for bfloat16 matrix products (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
