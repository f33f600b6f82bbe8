"""Attention with an extra key of zeros, so that a query can attend to nothing.

A = exp(s) / (1 + sum of exp(s) over the keys)        out = A v        with the scores s = q k^T / sqrt(d)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from perceiver_core import masks
from perceiver_core.argument_errors import explained
from perceiver_core.kernels.fastest import fastest
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values
from perceiver_core.masked_values import without_masked
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
@explained
def add_zero_attn(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    mask: Mask | None = None,
    kernel: Callable[..., Tensor] = fastest,
    **options: object,
) -> Outputs:
    """Compute attention with one extra key and value, both all zeros. The extra key is never masked.

    To use another kernel in an attention module, pass `functools.partial(add_zero_attn, kernel=...)` to the module.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Attention mask for the keys in `k`.
        kernel: Attention kernel that is called with the extra key and value.
        options: Other keyword arguments of the kernel, such as `dropout`.

    Example:
        >>> q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), torch.ones(1, 1, 3, 1)
        >>> pc.kernels.add_zero_attn(q, k, v).item()  # three of four
        0.75

    Reference: Miller 2023, "Attention Is Off By One"; torch.nn.MultiheadAttention, `add_zero_attn`.
    """
    # The extra key is inserted before all keys. Positions count from the end, so the other keys keep their positions.
    if mask is not None:
        masks.check_broadcast(mask, q, k)
        allowed = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
        q, k, v = without_masked(q, k, v, allowed[(None,) * (2 - allowed.ndim)])
        mask = F.pad(allowed.expand(*allowed.shape[:-1], k.shape[-2]), (1, 0), value=True)
    return kernel(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), mask=mask, **options)
