"""PyTorch's fused attention kernels, with what they refuse made to fit, exactly.

`torch.nn.functional.scaled_dot_product_attention` picks flash, cuDNN, memory-efficient or plain matrix products;
`torch.nn.attention.sdpa_kernel` overrides its choice, and `torch.nn.attention.activate_flash_attention_impl` brings
FlashAttention-3 or 4 where they are installed. Four things keep it off the flash kernels, and are mended here: values
of another width than the keys, (on CUDA) widths that are not a multiple of 8, masks of padding, for which keys are
packed, and causal attention of the last queries to all keys (both: `ragged`). Columns of zeros change no score and no
output. What is left is said by `kernel_for`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core import masks
from perceiver_core.kernels import varlen
from perceiver_core.masks import Mask
from perceiver_core.registry import register


@register
def sdpa(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "b h q e"]:
    """Fused attention by PyTorch.

    Args and result are those of `reference`.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import reference, sdpa
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(sdpa(q, k, v), reference(q, k, v))
    """
    if checks.autocasting(q.device):
        # Autocast converts inside the kernel; the widths are seen before that, so convert here.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype == torch.float32 else x for x in (q, k, v))
    scale, value_width = q.shape[-1] ** -0.5, v.shape[-1]
    width = fused_width(q.shape[-1], value_width, q.device)
    q, k, v = (_widen(x, width) for x in (q, k, v))
    if mask is None or (isinstance(mask, masks.Causal) and q.shape[-2] == k.shape[-2]):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=mask is not None, scale=scale)
        return out[..., :value_width]
    masks.fits(mask, q, k)
    if not dropout and varlen.takes(q):
        if isinstance(mask, masks.Causal) and q.shape[-2] < k.shape[-2]:
            return varlen.attend_causally(q, k, v, scale=scale)[..., :value_width]
        if (there := varlen.present(mask)) is not None:
            return varlen.attend(q, k, v, there, scale=scale)[..., :value_width]
    allowed = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2], device=q.device)
    some = allowed.any(-1, keepdim=True)
    # The kernels differ on rows with nothing to attend to, so they never see one.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_four_axes(allowed | ~some), dropout_p=dropout, scale=scale)
    return out[..., :value_width].masked_fill(~some, 0.0)


class Kernel(NamedTuple):
    """A kernel of PyTorch, and why it is not a flash kernel where it is not."""

    name: str
    why: str = ""


def kernel_for(
    key_width: int, value_width: int, dtype: torch.dtype, device: torch.device, mask: Mask | None = None
) -> Kernel:
    """Which of PyTorch's kernels `sdpa` has for heads of these widths, without dropout.

    On CUDA "flash or cuDNN", of which PyTorch takes the one that it knows to be faster; "flash, packed"; "cuDNN or
    memory-efficient"; or "memory-efficient". A causal mask is taken to have no more queries than keys, and with as many
    to be no mask.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels.sdpa import kernel_for
        >>> kernel_for(64, 64, torch.float32, torch.device("cpu"))
        Kernel(name="PyTorch's for the CPU", why='')
    """
    if device.type != "cuda":
        return Kernel(f"PyTorch's for the {'CPU' if device.type == 'cpu' else device.type}")
    if why := varlen.why_not(dtype, fused_width(key_width, value_width, device), device):
        return Kernel("memory-efficient", why)
    if mask is None:
        return Kernel("flash or cuDNN")
    if not isinstance(mask, masks.Causal) and varlen.present(mask) is None:
        return Kernel("cuDNN or memory-efficient", "flash kernels take masks of keys alone and causal ones")
    return Kernel("flash, packed") if varlen.has_varlen() else Kernel("memory-efficient", "PyTorch 2.11 packs keys")


def fused_width(key_width: int, value_width: int, device: torch.device) -> int:
    """The head width that the fused kernels of a device take: one for keys and values, on CUDA a multiple of 8."""
    width = max(key_width, value_width)
    return -(-width // 8) * 8 if device.type == "cuda" else width


def _widen(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _four_axes(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]
