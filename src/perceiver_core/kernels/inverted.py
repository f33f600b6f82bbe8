"""Inverted attention: queries compete for the keys, as the slots of slot attention do.

W = softmax(q k^T / sqrt(d)) over the queries        A = W / sum of W over the keys        out = A v

A query that may attend to nothing gives zeros, as in every kernel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import masks
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
def inverted(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h q e"]:
    """Attention whose softmax is over the queries: what one of them takes, the others do not get.

    Every query matters to every other, so queries cannot be answered by themselves or in chunks. Weights are written
    out, in memory q x k; they are normalized as logarithms, so a query that loses every key still gets an average.

    Args:
        q: queries.
        k: keys, of the queries' width.
        v: values, of any width.
        mask: see `masks`. A query does not compete for keys that it may not attend to.
        dropout: the rate at which attention weights are dropped.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import inverted
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> inverted(q, k, v).shape
        torch.Size([2, 4, 7, 5])

    Reference: Wu et al. 2023, "Inverted-Attention Transformers can Learn Object Representations: Insights from Slot
    Attention"; Locatello et al. 2020 (Slot Attention), equations 1 and 2.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).mT).to(wide)
    if mask is None:
        weights = scores.log_softmax(-2).softmax(-1)
    else:
        masks.fits(mask, q, k)
        allowed = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
        lowest = torch.finfo(wide).min
        shares = scores.masked_fill(~allowed, lowest).log_softmax(-2).masked_fill(~allowed, lowest)
        weights = shares.softmax(-1).masked_fill(~allowed, 0.0)
    return F.dropout(weights, dropout).to(v.dtype) @ v


inverted.competes = True  # type: ignore[attr-defined] # what one query gets depends on which others ask
