"""Linear layers applied with oneDNN for large float32 products on CPUs where oneDNN is faster than MKL.

On x86 CPUs, PyTorch multiplies float32 matrices with MKL. On non-Intel processors with AVX-512, MKL reaches only half
of the available throughput, and oneDNN is twice as fast. In eager mode, `apply_linear` then calls the oneDNN operator
that torch.compile uses. Otherwise, it calls the layer. Both libraries accumulate in float32.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _modules
from torch.utils._python_dispatch import _get_current_dispatch_mode

from perceiver_core import tracing

MIN_PRODUCTS = 2**22  # scalar multiplications; below, MKL has less overhead
MIN_WIDTH = 16  # inner dimension and number of columns; below, oneDNN cannot fill its vector registers
MAX_DEPTH = 8  # ratio of the inner dimension to the larger outer one; above, MKL parallelizes better


def apply_linear(layer: nn.Module, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Return `layer(x)`, with oneDNN if `layer` is an unmodified `nn.Linear` and oneDNN is faster; see `uses_onednn`.

    The layers themselves stay `nn.Linear`, because PyTorch's quantization, opacus and other tools look for this exact
    type. A layer with hooks or a replaced `forward` method is called as usual; see `bypass_reason`.

    Example:
        >>> from perceiver_core.layers.linear import apply_linear
        >>> layer, x = nn.Linear(512, 256), torch.randn(64, 512)
        >>> torch.testing.assert_close(apply_linear(layer, x), layer(x))
    """
    if (
        type(layer) is not nn.Linear
        or type(x) is not Tensor
        or torch.compiler.is_compiling()
        or x.numel() * layer.out_features < MIN_PRODUCTS
        or bypass_reason(layer)
        or _observes_all()
        or not uses_onednn(x, layer.weight, layer.bias)
    ):
        out: Tensor = layer(x)
        return out
    rows = x.reshape(-1, x.shape[-1])
    out = _Product.apply(rows, layer.weight, layer.bias)  # type: ignore[no-untyped-call, unused-ignore]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def bypass_reason(layer: nn.Module) -> str:
    """Return the reason why a module must be called, or an empty string if its weights may be used without a call."""
    state = layer.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "has a hook, which expects it to be called"
    if state.get("_compiled_call_impl") is not None:
        return "was compiled"
    return "has a forward that was replaced" if "forward" in state else ""


def _observes_all() -> bool:
    """Return whether a global hook, or a patched method of `nn.Linear` or `nn.Module`, observes the calls of layers."""
    hooks = (
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )
    # By module names and not by identity, because a tool may have patched them before this import.
    patched = (
        nn.Linear.forward.__module__ != "torch.nn.modules.linear"
        or nn.Module.__call__.__module__ != "torch.nn.modules.module"
        or F.linear is not torch._C._nn.linear
    )
    return bool(hooks) or patched


def uses_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether `apply_linear` uses oneDNN for these tensors: in eager mode, for large enough float32 products.

    Always False on CPUs where oneDNN is not faster. Always False under torch.compile, torch.export, torch.func,
    forward-mode AD, tracing, autocast, and modes such as FlopCounterMode, which need PyTorch's standard operators.
    """
    if torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not nn.Parameter):
        return False
    if not x.ndim or weight.ndim != 2:
        return False
    columns, terms = weight.shape
    numel = x.numel()
    if numel * columns < MIN_PRODUCTS or min(columns, terms) < MIN_WIDTH:
        return False
    if x.shape[-1] != terms or terms > MAX_DEPTH * max(numel // terms, columns):
        return False
    return (bias is None or bias.shape == weight.shape[:1]) and is_faster() and _are_plain(x, weight, bias)


def is_faster() -> bool:
    """Return whether oneDNN is enabled and expected to be faster than MKL: on non-Intel CPUs with AVX-512."""
    return _is_faster() and bool(torch.backends.mkldnn.enabled)


@cache
def _is_faster() -> bool:
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in _vendor()


def _vendor() -> str:
    """Return text that names the CPU vendor: the `vendor_id` line of /proc/cpuinfo.

    If there is no such line, return "Intel", so that MKL is used. If there is no such file, return
    `platform.processor()`.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "Intel")


class _Product(torch.autograd.Function):
    """Autograd function for `a @ b.T + bias` with oneDNN. Its backward pass is differentiable."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        for_a, for_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if for_b else None, b if for_a else None)
        bias = None if bias is None else bias.contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_without_gaps(a), _without_gaps(b), bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if gradient is None:
            return None, None, None
        (a, b), needed = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _product(gradient, b.t()) if needed[0] else None,
            _product(gradient.t(), a.t()) if needed[1] else None,
            gradient.sum(0) if needed[2] else None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T`, computed with oneDNN if `uses_onednn(a, b)`, else with PyTorch's standard operator."""
    if not uses_onednn(a, b):
        return a @ b.t()
    out: Tensor = _Product.apply(a, b, None)  # type: ignore[no-untyped-call, unused-ignore]
    return out


def _are_plain(*tensors: Tensor | None) -> bool:
    """Return whether all are plain float32 CPU tensors, outside autocast, PyTorch modes, torch.func and tracing."""
    for x in tensors:
        if x is None:
            continue
        if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided or x.is_nested:
            return False
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return False
    if torch.is_autocast_enabled("cpu") or torch._C._get_tracing_state() is not None:
        return False
    if _get_current_dispatch_mode() is not None or torch._C._len_torch_function_stack():
        return False
    return not tracing.transformed()


def _without_gaps(x: Tensor) -> Tensor:
    """Return `x` if row- or column-major, else a copy: oneDNN is hundreds of times slower on other layouts."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
