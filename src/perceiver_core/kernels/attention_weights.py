"""The weights that any kernel gives: what it makes of values of which each is one, for its own key alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from perceiver_core.kernels.chunked import chunked
from perceiver_core.kernels.fastest import fastest
from perceiver_core.masks import Mask
from perceiver_core.kernels.reference import attention_map, reference
from perceiver_core.kernels.sdpa import sdpa

SOFTMAX = (fastest, sdpa, chunked, reference)


def unwrapped(kernel: Any) -> Any:
    """The function that `functools.partial` was given, or what is no partial itself."""
    while isinstance(kernel, partial):
        kernel = kernel.func
    return kernel


def weights_of(
    kernel: Callable[..., Tensor],
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    *,
    mask: Mask | None = None,
    queries: int | Sequence[int] | Int[Tensor, " chosen"] | None = None,
    block: int = 256,
) -> Float[Tensor, "b h chosen k"]:
    """The weights with which a kernel adds up the values, for chosen queries.

    Those of this library's softmax kernels are written out by `attention_map`. Any other is asked for them, with
    values that are rows of the identity, a block of keys at a time: exact for kernels linear in the values.

    Args:
        kernel: `(q, k, v, *, mask) -> out`.
        q: queries.
        k: keys.
        mask: as the kernel is given.
        queries: which queries to give the weights of, by index; all of them unless given.
        block: how many keys the kernel is asked about at once.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import inverted, weights_of
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(weights_of(inverted, q, k) @ v, inverted(q, k, v))
    """
    if unwrapped(kernel) in SOFTMAX:
        return attention_map(q, k, mask=mask, queries=queries)
    rows = slice(None) if queries is None else torch.as_tensor(queries, device=q.device).reshape(-1)
    keys = torch.arange(k.shape[-2], device=k.device)
    blocks = []
    for start in range(0, k.shape[-2], block):
        ones = (keys[:, None] == keys[start : start + block]).to(k.dtype).expand(*k.shape[:2], -1, -1)
        blocks.append(kernel(q, k, ones, mask=mask)[..., rows, :])
    return torch.cat(blocks, dim=-1)
