"""PyTorch's flash kernel for packed keys, where its other kernels would need a mask written out.

A mask keeps PyTorch off its flash kernels; how many keys each sample has does not, nor does causal attention that
lines up at the end. So keys that are there are packed, one sample after the other. Packing is a stable sort of which
keys are there, so masks of any pattern are served, nothing waits for the GPU, and sizes stay fixed: what is not there
lies behind all samples, where no kernel looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import masks
from perceiver_core.masks import Mask

WIDEST = 256  # the widest head of the flash kernel
CAPABILITY = (8, 0)  # of the GPU, at least


class Packed(NamedTuple):
    """Keys and values of a batch, packed."""

    keys: Float[Tensor, "bn h d"]
    values: Float[Tensor, "bn h e"]
    starts: Int[Tensor, " samples_and_one"]


def present(mask: Mask) -> Bool[Tensor, "#b n"] | None:
    """Which keys are there, if that is all that a mask says.

    Example:
        >>> import torch
        >>> from perceiver_core import masks
        >>> from perceiver_core.kernels.varlen import present
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # no GPU comes while a graph is made
def why_not(dtype: torch.dtype, width: int, device: torch.device) -> str:
    """Why PyTorch's flash kernels do not take queries of this dtype and width on a device; empty if they do."""
    if device.type != "cuda":
        return "flash kernels run on CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; use torch.autocast"
    if width > WIDEST:
        return f"flash kernels take heads up to {WIDEST} wide, not {width}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "flash kernels need a GPU of compute capability 8.0 or higher"
    return ""


def takes(q: Float[Tensor, "b h q d"]) -> bool:
    """Whether PyTorch's flash kernel takes packed keys for these queries."""
    if torch._C._are_functorch_transforms_active():  # which that kernel has no rules for
        return False
    return not why_not(q.dtype, q.shape[-1], q.device) and has_varlen()


def attend(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k d"],
    there: Bool[Tensor, "#b k"],
    *,
    scale: float,
) -> Float[Tensor, "b h q d"]:
    """Attention to the keys that are there; zeros where none is."""
    there = there.expand(k.shape[0], k.shape[2])
    out = _run(q, pack(k, v, there), k.shape[2], (-1, -1), scale)
    return out.masked_fill(~there.any(1)[:, None, None, None], 0.0)


def attend_causally(
    q: Float[Tensor, "b h q d"], k: Float[Tensor, "b h k d"], v: Float[Tensor, "b h k d"], *, scale: float
) -> Float[Tensor, "b h q d"]:
    """Attention to no later position, where the last query lines up with the last key."""
    batch, keys = k.shape[0], k.shape[2]
    starts = torch.arange(0, (batch + 1) * keys, keys, device=q.device, dtype=torch.int32)
    flat = [rearrange(x, "b h n d -> (b n) h d") for x in (k, v)]
    return _run(q, Packed(flat[0], flat[1], starts), keys, (-1, 0), scale)


def _run(
    q: Float[Tensor, "b h q d"], packed: Packed, most: int, window: tuple[int, int], scale: float
) -> Float[Tensor, "b h q d"]:
    batch, _, queries, _ = q.shape
    starts = torch.arange(0, (batch + 1) * queries, queries, device=q.device, dtype=torch.int32)
    asked = rearrange(q, "b h m d -> (b m) h d")
    out = _varlen()(
        asked, packed.keys, packed.values, starts, packed.starts, queries, most, scale=scale, window_size=window
    )
    return rearrange(out, "(b m) h d -> b h m d", b=batch)


def pack(k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], there: Bool[Tensor, "b n"]) -> Packed:
    """Keys and values with those in front that are there. Kernels differ on samples without a key: these get a zero.

    Returns:
        `starts` says where each sample starts, and in the end how many keys there are in all, in int32.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels.varlen import pack
        >>> k = torch.arange(6.0).reshape(2, 1, 3, 1)
        >>> packed = pack(k, k, torch.tensor([[True, False, True], [False, True, False]]))
        >>> packed.keys.flatten().tolist()[:3], packed.starts.tolist()
        ([0.0, 2.0, 4.0], [0, 2, 3])
    """
    taken = torch.cat([there[:, :1] | ~there.any(1, keepdim=True), there[:, 1:]], 1)
    order = taken.flatten().logical_not().argsort(stable=True)
    flat = [rearrange(x, "b h n d -> (b n) h d") for x in (k, v)]
    keys, values = (_Reordered.apply(x, order, there.flatten()) for x in flat)  # type: ignore[no-untyped-call]
    return Packed(keys, values, F.pad(taken.sum(1).cumsum(0), (1, 0)).int())


class _Reordered(torch.autograd.Function):
    """x[order] for a permutation, whose gradient is put back in place without adding anything up.

    What is not there is zero, whatever it holds, and so is its gradient: that of what a kernel never looked at is
    whatever lay in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, there: Tensor) -> Tensor:
        ctx.save_for_backward(order, there)
        return x[order].masked_fill_(~there[order][:, None, None], 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, there = ctx.saved_tensors
        return gradient[order.argsort()].masked_fill_(~there[:, None, None], 0.0), None, None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_varlen() -> bool:
    """Whether this PyTorch has attention to packed keys with a scale of one's own: from 2.11 on."""
    return {"scale", "window_size"} <= _parameters()


@cache
def _parameters() -> set[str]:
    try:
        return set(inspect.signature(_varlen()).parameters)
    except ImportError:
        return set()


def _varlen() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
