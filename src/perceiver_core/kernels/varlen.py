"""PyTorch's flash kernel for packed (variable-length) sequences, used for key-padding masks and causal attention.

PyTorch's other flash kernels support neither mask tensors nor causal attention with fewer queries than keys. The kernel
for packed sequences supports a different number of keys per sample. In causal attention, it aligns the last query with
the last key.

For a key-padding mask, the keys of all samples are concatenated, and a stable sort moves the masked keys to the end,
where the kernel does not read. Therefore, padding can be anywhere in a sample, tensor sizes are static, and the CPU
never waits for the GPU.
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

from perceiver_core import masks, tracing
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values
from perceiver_core.masks import Mask

WIDEST = 256  # maximum head dimension of the flash kernels
CAPABILITY = (8, 0)  # minimum compute capability of the GPU


class Packed(NamedTuple):
    """Packed keys and values, and cumulative sequence lengths: 0, 3, 5 for samples of 3 and 2 keys."""

    keys: Float[Tensor, "bn h d"]
    values: Float[Tensor, "bn h e"]
    starts: Int[Tensor, " samples_and_one"]


def valid_keys(mask: Mask) -> Bool[Tensor, "#b n"] | None:
    """Return a key-padding mask as a boolean tensor `b n`, or None for any other mask.

    Example:
        >>> from perceiver_core.kernels.varlen import valid_keys
        >>> valid = torch.tensor([[True, False]])
        >>> valid_keys(pc.masks.Padding(valid)), valid_keys(pc.masks.Causal())
        (tensor([[ True, False]]), None)
    """
    rules, tensors = masks.split(mask)
    if rules or not tensors or any(x.ndim != 4 or x.shape[1] != 1 or x.shape[2] != 1 for x in tensors):
        return None
    allowed = tensors[0]
    for other in tensors[1:]:
        allowed = allowed & other
    return allowed[:, 0, 0]


@tracing.constant_under_compile  # GPUs do not change during tracing
def why_not(dtype: torch.dtype, width: int, device: torch.device) -> str:
    """Return the reason why flash kernels do not support a dtype, head dimension or device, or "" if they do."""
    if device.type != "cuda":
        return "flash kernels run on CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; use torch.autocast"
    if width > WIDEST:
        return f"flash kernels take heads up to {WIDEST} wide, not {width}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "flash kernels need a GPU of compute capability 8.0 or higher"
    return ""


def is_supported(q: Float[Tensor, "b h q d"]) -> bool:
    """Return whether the kernel for packed sequences supports the dtype, head dimension and device of `q`.

    Always False under torch.func transforms, and for a batch size of 0.
    """
    if not torch.compiler.is_compiling() and not q.shape[0]:
        return False
    if torch._C._are_functorch_transforms_active():  # the kernel does not support torch.func
        return False
    return not why_not(q.dtype, q.shape[-1], q.device) and has_varlen()


def attend(q: Queries, k: Keys, v: Values, valid: Bool[Tensor, "#b k"], *, scale: float) -> Outputs:
    """Compute attention to the keys where `valid` is True. Keys and values must have the same head dimension.

    The output is zero for samples without a valid key.
    """
    valid = valid.expand(k.shape[0], k.shape[2])
    out = _run(q, pack(k, v, valid), k.shape[2], (-1, -1), scale)
    return out.masked_fill(~valid.any(1)[:, None, None, None], 0.0)


def attend_causal(q: Queries, k: Keys, v: Values, *, scale: float) -> Outputs:
    """Compute causal attention that aligns the last query with the last key.

    Keys and values must have the same head dimension.
    """
    keys, values = (rearrange(x, "b h n d -> (b n) h d") for x in (k, v))
    return _run(q, Packed(keys, values, _equal_starts(k)), k.shape[2], (-1, 0), scale)


def _run(q: Queries, packed: Packed, max_keys: int, window: tuple[int, int], scale: float) -> Outputs:
    queries, sizes = rearrange(q, "b h m d -> (b m) h d"), (q.shape[2], max_keys)
    starts = (_equal_starts(q), packed.starts)
    out = _varlen()(queries, packed.keys, packed.values, *starts, *sizes, scale=scale, window_size=window)
    return rearrange(out, "(b m) h d -> b h m d", b=q.shape[0])


def _equal_starts(x: Float[Tensor, "b h n d"]) -> Int[Tensor, " samples_and_one"]:
    """Return cumulative sequence lengths for a batch without padding: 0, n, 2 n, ..., batch x n."""
    batch, _, n, _ = x.shape
    return torch.arange(0, (batch + 1) * n, n, device=x.device, dtype=torch.int32)


def pack(k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], valid: Bool[Tensor, "b n"]) -> Packed:
    """Concatenate the valid keys and values of all samples, and append zeros up to the full length b * n.

    Samples without a valid key get one key of zeros, because kernels differ in how they treat empty sequences.

    Example:
        >>> from perceiver_core.kernels.varlen import pack
        >>> k = torch.arange(6.0).reshape(2, 1, 3, 1)
        >>> packed = pack(k, k, torch.tensor([[True, False, True], [False, True, False]]))
        >>> packed.keys.flatten().tolist()[:3], packed.starts.tolist()
        ([0.0, 2.0, 4.0], [0, 2, 3])
    """
    taken = torch.cat([valid[:, :1] | ~valid.any(1, keepdim=True), valid[:, 1:]], 1)
    order = taken.flatten().logical_not().argsort(stable=True)
    reorder: Callable[..., Tensor] = _Reordered.apply
    keys, values = (reorder(rearrange(x, "b h n d -> (b n) h d"), order, valid.flatten()) for x in (k, v))
    return Packed(keys, values, F.pad(taken.sum(1).cumsum(0), (1, 0)).int())


class _Reordered(torch.autograd.Function):
    """Autograd function that permutes the first axis of `x` and sets masked positions to zero.

    The backward pass indexes with the inverse permutation, which is faster than autograd's accumulating `index_put`. It
    sets gradients at masked positions to zero, because the flash kernel leaves them uninitialized.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(order, valid)
        return x[order].masked_fill_(~valid[order][:, None, None], 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, valid = ctx.saved_tensors
        return gradient[order.argsort()].masked_fill_(~valid[:, None, None], 0.0), None, None


@tracing.constant_under_compile
def has_varlen() -> bool:
    """Return whether PyTorch has a `varlen_attn` with `scale` and `window_size`. This requires PyTorch 2.11."""
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
