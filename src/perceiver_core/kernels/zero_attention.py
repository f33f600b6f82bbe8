"""A token of zeros beside the keys, so that a query may attend to nothing.

A = exp(s) / (1 + sum of exp(s))        out = A v

Any kernel computes it, on one key more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import masks
from perceiver_core.kernels.fastest import fastest
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
def add_zero_attn(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    kernel: Callable[..., Tensor] = fastest,
    **options: Any,
) -> Float[Tensor, "b h q e"]:
    """Attention by any kernel to the keys and to one of zeros, whose value is zero, and which no mask hides.

    `functools.partial(add_zero_attn, kernel=...)` is a kernel too.

    Args:
        q: queries.
        k: keys, of the queries' width.
        v: values, of any width.
        mask: who may attend to which of the keys; see `masks`.
        kernel: attends.
        options: the kernel's others, such as `dropout`.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import add_zero_attn
        >>> q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), torch.ones(1, 1, 3, 1)
        >>> add_zero_attn(q, k, v).item()  # three of four
        0.75

    Reference: Miller 2023, "Attention Is Off By One"; torch.nn.MultiheadAttention, `add_zero_attn`.
    """
    beside = None if mask is None else _beside(mask, q, k)
    # In front: positions count from the end, so those of the keys stay what they are.
    return kernel(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), mask=beside, **options)


def _beside(mask: Mask, q: Tensor, k: Tensor) -> Mask:
    """The mask with a first key that all may attend to."""
    masks.fits(mask, q, k)
    if isinstance(mask, masks.Padding):
        return masks.Padding(F.pad(mask.keys, (1, 0), value=True))
    allowed = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
    return F.pad(allowed.expand(*allowed.shape[:-1], k.shape[-2]), (1, 0), value=True)
