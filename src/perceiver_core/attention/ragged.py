"""Padding masks on CUDA without a mask: the keys that are there, packed one sample after the other.

A mask keeps PyTorch off its flash kernel; packed keys and their number in each sample do not. Packing is a stable sort
of which keys are there, so masks of any pattern are served, nothing waits for the GPU, and sizes stay fixed: what is
not there lies behind all samples, where no kernel looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.attention import masks
from perceiver_core.attention.masks import Mask

WIDEST = 256  # the widest head of the flash kernel
CAPABILITY = (8, 0)


class Packed(NamedTuple):
    """Keys and values of a batch, packed."""

    keys: Float[Tensor, "bn h d"]
    values: Float[Tensor, "bn h e"]
    starts: Int[Tensor, " samples_and_one"]


def present(mask: Mask) -> Bool[Tensor, "#b n"] | None:
    """Which keys are there, if that is all that a mask says.

    Example:
        >>> import torch
        >>> from perceiver_core.attention import masks
        >>> from perceiver_core.attention.ragged import present
        >>> there = torch.tensor([[True, False]])
        >>> present(masks.Padding(there)), present(masks.Causal())
        (tensor([[ True, False]]), None)
    """
    rules, tensors = masks.taken_apart(mask)
    if rules or not tensors or any(x.ndim != 4 or x.shape[1] != 1 or x.shape[2] != 1 for x in tensors):
        return None
    allowed = tensors[0]
    for other in tensors[1:]:
        allowed = allowed & other
    return allowed[:, 0, 0]


def takes(q: Float[Tensor, "b h q d"]) -> bool:
    """Whether PyTorch's flash kernel takes packed keys for these queries: half precision, on CUDA, heads not too wide."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > WIDEST:
        return False
    return _varlen() is not None and torch.cuda.get_device_capability(q.device) >= CAPABILITY


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k d"],
    there: Bool[Tensor, "#b k"],
    *,
    scale: float,
) -> Float[Tensor, "b h q d"]:
    """Attention to the keys that are there; zeros where none is."""
    batch, _, queries, _ = q.shape
    there = there.expand(batch, k.shape[2])
    some = there.any(1)
    # Kernels differ on samples without a key, so they never see one.
    packed = pack(k, v, torch.cat([there[:, :1] | ~some[:, None], there[:, 1:]], 1))
    starts = torch.arange(0, (batch + 1) * queries, queries, device=q.device, dtype=torch.int32)
    varlen: Any = _varlen()
    asked = rearrange(q, "b h m d -> (b m) h d")
    out = varlen(asked, packed.keys, packed.values, starts, packed.starts, queries, k.shape[2], scale=scale)
    out = rearrange(out, "(b m) h d -> b h m d", b=batch)
    return out.masked_fill(~some[:, None, None, None], 0.0)


def pack(k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], there: Bool[Tensor, "b n"]) -> Packed:
    """Keys and values with those in front that are there.

    Returns:
        `starts` says where each sample starts, and in the end how many keys there are in all, in int32.

    Example:
        >>> import torch
        >>> from perceiver_core.attention.ragged import pack
        >>> k = torch.arange(6.0).reshape(2, 1, 3, 1)
        >>> packed = pack(k, k, torch.tensor([[True, False, True], [False, True, False]]))
        >>> packed.keys.flatten().tolist()[:3], packed.starts.tolist()
        ([0.0, 2.0, 4.0], [0, 2, 3])
    """
    order = there.flatten().logical_not().argsort(stable=True)
    keys, values = (_Reordered.apply(rearrange(x, "b h n d -> (b n) h d"), order) for x in (k, v))  # type: ignore[no-untyped-call]
    return Packed(keys, values, F.pad(there.sum(1).cumsum(0), (1, 0)).int())


class _Reordered(torch.autograd.Function):
    """x[order] for a permutation, whose gradient is put back in place without adding anything up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient[order.argsort()], None


def _varlen() -> Callable[..., Tensor] | None:
    """PyTorch's attention to packed keys, from 2.11 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None
