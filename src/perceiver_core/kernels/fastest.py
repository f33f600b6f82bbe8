"""The default kernel: the fastest of this package for what it is given."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core import checks
from perceiver_core.kernels.chunked import chunked
from perceiver_core.masks import Mask
from perceiver_core.kernels.sdpa import sdpa
from perceiver_core.registry import register

PIECE = 1024  # keys; the scores of a piece should stay in the cache
LITTLE = 2**25  # multiplications for the scores


@register
def fastest(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h q e"]:
    """`sdpa`, and in bfloat16 on a processor with units for it `chunked`, made of products in bfloat16.

    There PyTorch's fused kernel is no faster in bfloat16 than in float32, and products are several times faster.
    Scores are then rounded to bfloat16, as where attention is written out in it, which adds about as much error as
    the rounding of queries and keys; `kernel=sdpa` keeps them in float32.

    Args and result are those of `sdpa`.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import fastest, reference
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(fastest(q, k, v), reference(q, k, v))
    """
    if takes_products(q, k.shape[-2], dropout=dropout):
        half = (x.to(torch.bfloat16) for x in (q, k, v))
        return chunked(*half, mask=mask, chunk_size=PIECE, half_precision_matmul=True)
    return sdpa(q, k, v, mask=mask, dropout=dropout)


def takes_products(q: Tensor, keys: int, *, dropout: float = 0.0) -> bool:
    """Whether `fastest` takes `chunked` for these queries and so many keys.

    Not for little work, which PyTorch's kernel starts sooner. Nor under torch.compile and torch.export: the choice
    would depend on sizes that may vary, and on the machine on which the graph is made.
    """
    if q.device.type != "cpu" or dropout or torch.compiler.is_compiling():
        return False
    enough = q.numel() * keys >= LITTLE
    return enough and checks.product_dtype(q) == torch.bfloat16 and has_bfloat16_units()


def has_bfloat16_units() -> bool:
    """Whether this processor is known to multiply matrices in bfloat16 without emulation: x86 with the units for it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
