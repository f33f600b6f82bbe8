"""Attention weights of an arbitrary attention kernel, obtained by passing one-hot vectors as the values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core.argument_errors import explained
from perceiver_core.kernels.chunked import chunked
from perceiver_core.kernels.fastest import fastest
from perceiver_core.kernels.reference import Keys, Queries, QueryIndices, attention_map, query_rows, reference
from perceiver_core.kernels.sdpa import sdpa
from perceiver_core.masks import Mask

SOFTMAX = (fastest, sdpa, chunked, reference)


def unwrapped(kernel: object) -> object:
    """Return `kernel` without its `functools.partial` wrappers, if it has any."""
    while isinstance(kernel, partial):
        kernel = kernel.func
    return kernel


@explained
def kernel_attention_map(
    kernel: Callable[..., Tensor],
    q: Queries,
    k: Keys,
    *,
    mask: Mask | None = None,
    queries: QueryIndices = None,
    block: int = 256,
) -> Float[Tensor, "b h chosen k"]:
    """Return the attention weights of a kernel for all queries, or for the queries with indices `queries`.

    For this library's softmax kernels, the weights are computed with `attention_map`. Any other kernel is called with
    one-hot vectors as the values, one block of keys at a time, so that the kernel outputs its weights. This is exact
    for kernels that are linear in the values.

    Args:
        kernel: Attention kernel `(q, k, v, *, mask) -> out`.
        q: Queries.
        k: Keys.
        mask: Attention mask; see `masks`.
        queries: Indices of the queries whose weights are returned; None for all queries.
        block: Number of keys per kernel call.

    Returns:
        Weights `b h chosen k`, where `chosen` is the number of indices in `queries`.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> weights = pc.kernels.kernel_attention_map(pc.kernels.inverted, q, k)
        >>> torch.testing.assert_close(weights @ v, pc.kernels.inverted(q, k, v))
    """
    if unwrapped(kernel) in SOFTMAX:
        return attention_map(q, k, mask=mask, queries=queries)
    rows = slice(None) if queries is None else query_rows(queries, q)
    keys = torch.arange(k.shape[-2], device=k.device)
    weights = []
    for start in range(0, k.shape[-2], block):
        one_hot = (keys[:, None] == keys[start : start + block]).to(k.dtype).expand(*k.shape[:2], -1, -1)
        weights.append(kernel(q, k, one_hot, mask=mask)[..., rows, :])
    return torch.cat(weights, dim=-1)
