"""Linear layers whose float32 products on a CPU are made by the faster of the two libraries that PyTorch carries.

PyTorch multiplies float32 matrices on x86 by MKL, which on other processors than Intel's gets half of what they can do
with AVX-512. oneDNN, which PyTorch has for convolutions and for bfloat16, gets twice as much there; it is called by the
operator by which torch.compile calls it. Both add up in float32. Elsewhere it is `nn.functional.linear`.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from perceiver_core import checks

LITTLE = 2**22  # multiplications below which MKL starts sooner
NARROW = 16  # columns and terms below which oneDNN has nothing to fill its vectors with
DEEP = 8  # terms of a sum for each row or column of the result, beyond which MKL shares work out better


class Linear(nn.Linear):
    """`nn.Linear`: the same weights, the same results to rounding, faster where `takes_onednn` says so.

    It is not of the very type `nn.Linear`, which `torch.ao.quantization.quantize_dynamic` looks for, nor can
    `torch.jit.script` compile it.

    Example:
        >>> import torch
        >>> from perceiver_core.linear import Linear
        >>> layer, x = Linear(512, 256), torch.randn(64, 512)
        >>> torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    """

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """`input @ weight.T + bias`."""
        weight, bias = self.weight, self.bias  # once: each may be computed
        if not takes_onednn(input, weight, bias):
            return F.linear(input, weight, bias)
        rows = input.reshape(-1, weight.shape[1])
        out: Tensor = _Product.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        return out.reshape(*input.shape[:-1], weight.shape[0])


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `Linear` has oneDNN multiply these: in eager mode, in float32, on a CPU where it is faster, and much.

    Not while something looks on that knows PyTorch's ordinary operators alone: torch.compile, torch.export,
    torch.func, a trace, or a mode such as FlopCounterMode.
    """
    if torch.compiler.is_compiling() or not is_faster() or not _ordinary(x, weight, bias):
        return False
    if not x.numel() or not x.ndim:
        return False
    fits = weight.ndim == 2 and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    return fits and _is_much(x.numel() // x.shape[-1], *weight.shape)


def is_faster() -> bool:
    """Whether oneDNN is known to multiply float32 matrices faster than MKL here: AVX-512 without Intel's name on it."""
    return _is_faster() and bool(torch.backends.mkldnn.enabled)


@cache
def _is_faster() -> bool:
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in _vendor()


def _vendor() -> str:
    """Who made the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "Intel, for all that is known")


class _Product(torch.autograd.Function):
    """a @ b.T + bias. Its gradients are such products too, so it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        for_a, for_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if for_b else None, b if for_a else None)
        bias = None if bias is None else bias.contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_laid_out(a), _laid_out(b), bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if gradient is None:
            return None, None, None
        (a, b), wanted = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _product(gradient, b.t()) if wanted[0] else None,
            _product(gradient.t(), a.t()) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` by the faster library, or as anybody who looks on expects."""
    if not _ordinary(a, b) or not _is_much(a.shape[0], *b.shape):
        return a @ b.t()
    out: Tensor = _Product.apply(a, b, None)  # type: ignore[no-untyped-call]
    return out


def _ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are plain float32 matrices on a CPU, and nothing stands between them and their operators."""
    for x in tensors:
        if x is None:
            continue
        if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided or x.is_nested:
            return False
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return False
    if checks.autocasting(torch.device("cpu")) or torch._C._get_tracing_state() is not None:
        return False
    if _get_current_dispatch_mode() is not None or torch._C._len_torch_function_stack():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def _laid_out(x: Tensor) -> Tensor:
    """A matrix without gaps, by rows or by columns: with others oneDNN takes hundreds of times as long."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _is_much(rows: int, columns: int, terms: int) -> bool:
    wide = min(columns, terms) >= NARROW and terms <= DEEP * max(rows, columns)
    return wide and rows * columns * terms >= LITTLE
