"""Softmax attention as its formula: what every other kernel is tested against.

    A = softmax(q k^T / sqrt(d))        out = A v

A query that may attend to nothing gives zeros: no value is its average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import masks
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
def reference(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h q e"]:
    """Attention with every weight written out: exact, twice differentiable, in memory q x k.

    Args:
        q: queries.
        k: keys, of the queries' width.
        v: values, of any width.
        mask: see `masks`; None attends everywhere.
        dropout: the rate at which attention weights are dropped.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import reference
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> reference(q, k, v).shape
        torch.Size([2, 4, 7, 5])

    Reference: Vaswani et al. 2017, equation 1.
    """
    weights = F.dropout(attention_map(q, k, mask=mask), dropout)
    return weights.to(v.dtype) @ v


def attention_map(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    *,
    mask: Mask | None = None,
    queries: int | Sequence[int] | Int[Tensor, " chosen"] | None = None,
) -> Float[Tensor, "b h chosen k"]:
    """The attention weights themselves, for chosen queries, beside whatever kernel computes the outputs.

    Args:
        q: queries.
        k: keys.
        mask: as the kernel was given.
        queries: which queries to give the weights of, by index; all of them unless given.

    Returns:
        Weights that add to 1 over the keys, or are all 0 for a query that may attend to nothing; in
        float32 for half precision.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import attention_map
        >>> q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8)
        >>> attention_map(q, k, queries=[0, 6]).shape
        torch.Size([2, 4, 2, 11])
    """
    if mask is not None:
        masks.fits(mask, q, k)
    rows = masks.positions(q.shape[-2], q.device)
    if queries is not None:
        chosen = torch.as_tensor(queries, device=q.device).reshape(-1)
        q, rows = q[..., chosen, :], rows[chosen]
    wide = torch.promote_types(q.dtype, torch.float32)
    # Scaled first and not in half precision, where a product may overflow; autocast narrows it all the same.
    scores = ((q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).mT).to(wide)
    if mask is None:
        return scores.softmax(-1)
    allowed = masks.block(mask, rows, masks.positions(k.shape[-2], k.device))
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, lowest).softmax(-1).masked_fill(~allowed, 0.0)
