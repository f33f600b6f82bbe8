"""PyTorch's fused attention kernels. Inputs are padded or packed, so that flash kernels support more of them.

`torch.nn.functional.scaled_dot_product_attention` selects a flash, cuDNN, memory-efficient or math kernel. To override
the selection, use `torch.nn.attention.sdpa_kernel`. To enable FlashAttention-3 or 4 (if installed), use
`torch.nn.attention.activate_flash_attention_impl`.

The head dimension is padded with zeros if keys and values differ in it or, on CUDA, if it is not a multiple of 8. The
padding changes neither scores nor outputs. On CUDA in half precision, key-padding masks and causal attention with fewer
queries than keys use PyTorch's kernel for packed sequences (see `varlen`). `kernel_for` returns the name of the kernel
that PyTorch uses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from perceiver_core import checks, masks, tracing
from perceiver_core.argument_errors import explained
from perceiver_core.kernels import varlen
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values, check_dropout
from perceiver_core.masked_values import without_masked
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
@explained
def sdpa(q: Queries, k: Keys, v: Values, *, mask: Mask | None = None, dropout: float = 0.0) -> Outputs:
    """Compute attention with PyTorch's fused kernels. The arguments are the same as for `reference`.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(pc.kernels.sdpa(q, k, v), pc.kernels.reference(q, k, v))
    """
    checks.attention_inputs(q=q, k=k, v=v)
    check_dropout(dropout)
    device_type = q.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        # Autocast would convert inside the kernel, after `varlen.is_supported` checks the dtype.
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(dtype) if x.dtype == torch.float32 else x for x in (q, k, v))
    scale, value_width = q.shape[-1] ** -0.5, v.shape[-1]
    if q.shape[-1] != value_width or device_type == "cuda":
        width = fused_width(q.shape[-1], value_width, q.device)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    if mask is None or (isinstance(mask, masks.Causal) and tracing.always(q.shape[-2] == k.shape[-2])):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=mask is not None, scale=scale)
        return out[..., :value_width]
    masks.check_broadcast(mask, q, k)
    if not dropout and varlen.is_supported(q):
        if isinstance(mask, masks.Causal) and q.shape[-2] < k.shape[-2]:
            return varlen.attend_causal(q, k, v, scale=scale)[..., :value_width]
        if (valid := varlen.valid_keys(mask)) is not None:
            return varlen.attend(q, k, v, valid, scale=scale)[..., :value_width]
    allowed = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
    allowed = allowed[(None,) * (4 - allowed.ndim)]
    q, k, v = without_masked(q, k, v, allowed)
    attends = allowed.any(-1, keepdim=True)
    # Kernels differ for queries whose keys are all masked. These queries attend to all keys here, and their output is
    # set to zero afterwards.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~attends, dropout_p=dropout, scale=scale)
    return out[..., :value_width].masked_fill(~attends, 0.0)


class Kernel(NamedTuple):
    """Name of a PyTorch kernel and, on CUDA, the reason why it is not a flash kernel (empty if it is)."""

    name: str
    why: str = ""


def kernel_for(
    key_width: int, value_width: int, dtype: torch.dtype, device: torch.device, mask: Mask | None = None
) -> Kernel:
    """Return the PyTorch kernel that `sdpa` uses for these head dimensions, without dropout.

    The names on CUDA are "flash or cuDNN", "flash, packed" (see `varlen`), "cuDNN or memory-efficient",
    "memory-efficient", and "math" for float64. If a name contains two kernels, the GPU and the cuDNN version determine
    which of them PyTorch uses. For `masks.Causal`, fewer queries than keys are assumed. For equal numbers, call
    `kernel_for` without a mask, because `sdpa` then passes `is_causal=True` to PyTorch instead of a mask.

    Example:
        >>> from perceiver_core.kernels.sdpa import kernel_for
        >>> kernel_for(64, 64, torch.float32, torch.device("cpu"))
        Kernel(name="PyTorch's for the CPU", why='')
    """
    if device.type != "cuda":
        return Kernel(f"PyTorch's for the {'CPU' if device.type == 'cpu' else device.type}")
    if why := varlen.why_not(dtype, fused_width(key_width, value_width, device), device):
        return Kernel("math" if dtype == torch.float64 else "memory-efficient", why)
    if mask is None:
        return Kernel("flash or cuDNN")
    if not isinstance(mask, masks.Causal) and varlen.valid_keys(mask) is None:
        return Kernel("cuDNN or memory-efficient", "flash kernels take key-padding masks and causal masks only")
    return Kernel("flash, packed") if varlen.has_varlen() else Kernel("memory-efficient", "packing needs PyTorch 2.11")


def fused_width(key_width: int, value_width: int, device: torch.device) -> int:
    """Return the head dimension after padding: the larger of the two, rounded up to a multiple of 8 on CUDA."""
    width = max(key_width, value_width)
    return -(-width // 8) * 8 if device.type == "cuda" else width
