"""Inverted attention: the softmax is over the queries, so queries compete for keys as slots do in slot attention.

W = softmax(q k^T / sqrt(d)) over the queries        A = W / sum of W over the keys        out = A v

The output of a query is zero if all its keys are masked.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from perceiver_core import checks, masks
from perceiver_core.argument_errors import explained
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values, check_dropout
from perceiver_core.masked_values import without_masked
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
@explained
def inverted(q: Queries, k: Keys, v: Values, *, mask: Mask | None = None, dropout: float = 0.0) -> Outputs:
    """Compute attention with a softmax over the queries, so that queries compete for each key.

    The output of a query depends on all other queries, so the queries cannot be processed in chunks. The attention
    weights take O(q x k) memory. They are normalized over the keys in log space, so that the output is an average of
    the values even if all weights of a query are tiny.

    The arguments are the same as for `reference`. If a key is masked for a query, the query does not compete for it.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> pc.kernels.inverted(q, k, v).shape
        torch.Size([2, 4, 7, 5])

    Reference: Wu et al. 2023, "Inverted-Attention Transformers can Learn Object Representations: Insights from Slot
    Attention"; Locatello et al. 2020 (Slot Attention), equations 1 and 2.
    """
    checks.attention_inputs(q=q, k=k, v=v)
    check_dropout(dropout)
    if mask is not None:
        masks.check_broadcast(mask, q, k)
        allowed = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
        allowed = allowed[(None,) * (2 - allowed.ndim)]
        q, k, v = without_masked(q, k, v, allowed)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).mT).to(wide)
    if mask is None:
        weights = scores.log_softmax(-2).softmax(-1)
    else:
        masked, lowest = ~allowed, torch.finfo(wide).min
        shares = scores.masked_fill(masked, lowest).log_softmax(-2).masked_fill(masked, lowest)
        weights = shares.softmax(-1).masked_fill(masked, 0.0)
    return F.dropout(weights, dropout).to(v.dtype) @ v


inverted.competes = True  # type: ignore[attr-defined] # the output of a query depends on the other queries
