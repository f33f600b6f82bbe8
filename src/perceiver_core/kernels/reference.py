"""Plain softmax attention, the reference for testing the other softmax kernels.

    A = softmax(q k^T / sqrt(d))        out = A v

The output of a query is zero if all its keys are masked. In shapes, b is the batch size, h the number of heads, q the
number of queries, k the number of keys, d the head dimension of queries and keys, and e the head dimension of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import argument_types, checks, masks
from perceiver_core.argument_errors import explained
from perceiver_core.masked_values import without_masked
from perceiver_core.masks import Mask
from perceiver_core.registry import register

Queries: TypeAlias = Float[Tensor, "b h q d"]
Keys: TypeAlias = Float[Tensor, "b h k d"]
Values: TypeAlias = Float[Tensor, "b h k e"]
Outputs: TypeAlias = Float[Tensor, "b h q e"]
QueryIndices: TypeAlias = int | Sequence[int] | Int[Tensor, " chosen"] | None


@register
@explained
def reference(q: Queries, k: Keys, v: Values, *, mask: Mask | None = None, dropout: float = 0.0) -> Outputs:
    """Compute softmax attention with the plain formula, which stores all q x k weights and is twice differentiable.

    Args:
        q: Queries, `b h q d`.
        k: Keys, `b h k d`.
        v: Values, `b h k e`.
        mask: Attention mask; see `masks`. None to attend to all keys.
        dropout: Dropout rate of the attention weights.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> pc.kernels.reference(q, k, v).shape
        torch.Size([2, 4, 7, 5])

    Reference: Vaswani et al. 2017, equation 1.
    """
    checks.attention_inputs(v=v)
    check_dropout(dropout)
    if mask is not None:
        masks.check_broadcast(mask, q, k)
        mask = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
        mask = mask[(None,) * (2 - mask.ndim)]
        v = v.masked_fill(~mask.any(-2).unsqueeze(-1), 0.0)
    return F.dropout(attention_map(q, k, mask=mask), dropout).to(v.dtype) @ v


def check_dropout(dropout: float) -> None:
    """Check the dropout rate of a kernel. The check is cheap, because it runs in every forward pass."""
    if type(dropout) is not float and not torch.compiler.is_compiling():
        argument_types.check({"dropout": dropout}, {"dropout": float})
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1]; got {dropout!r}")


@explained
def attention_map(
    q: Queries, k: Keys, *, mask: Mask | None = None, queries: QueryIndices = None
) -> Float[Tensor, "b h chosen k"]:
    """Return the softmax attention weights of all queries, or of the queries with indices `queries`.

    Args:
        q: Queries.
        k: Keys.
        mask: Attention mask; see `masks`.
        queries: Indices of the queries whose weights are returned; None for all queries.

    Returns:
        Weights `b h chosen k`, where `chosen` is the number of indices in `queries`, in at least float32. The weights
        of a query sum to 1 over the keys, or are all 0 if all its keys are masked.

    Example:
        >>> q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8)
        >>> pc.kernels.attention_map(q, k, queries=[0, 6]).shape
        torch.Size([2, 4, 2, 11])
    """
    checks.attention_inputs(q=q, k=k)
    if mask is not None:
        masks.check_broadcast(mask, q, k)
    rows = masks.positions(q.shape[-2], q.device)
    if queries is not None:
        selected = query_rows(queries, q)
        q, rows = q[..., selected, :], rows[selected]
    if mask is not None:
        allowed = masks.block(mask, rows, masks.positions(k.shape[-2], k.device))
        q, k, _ = without_masked(q, k, k, allowed)
    wide = torch.promote_types(q.dtype, torch.float32)
    # Scaled before the product, which may overflow in half precision. Autocast computes the product in half precision
    # even though both factors are float32.
    scores = ((q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).mT).to(wide)
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill(~allowed, torch.finfo(wide).min).softmax(-1).masked_fill(~allowed, 0.0)


def query_rows(queries: QueryIndices, q: Float[Tensor, "b h q d"]) -> Int[Tensor, " chosen"]:
    """Check query indices, which may be negative, and return them as a tensor.

    Raises:
        TypeError: If `queries` is not an integer, a sequence of integers or an integer tensor.
        ValueError: If an index is out of range.
    """
    try:
        rows = torch.as_tensor(queries, device=q.device).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"queries must be indices, or None for all; got {queries!r:.80}") from error
    if not rows.numel():
        return rows.long()
    rows, count = checks.whole_numbers("queries", rows), q.shape[-2]
    if not checks.is_true(lambda: ((rows >= -count) & (rows < count)).all(), rows):
        raise ValueError(f"queries must lie in {-count} ... {count - 1}; got {rows.tolist()!r:.80}")
    return rows
