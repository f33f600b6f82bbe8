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
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from perceiver_core import checks

is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 cannot tell

LITTLE = 2**21  # multiplications below which MKL starts sooner
PLAIN = (Tensor, nn.Parameter)
DEEP = 8  # terms of a sum for each row or column of the result, beyond which MKL shares work out better


class Linear(nn.Linear):
    """`nn.Linear`: the same weights, the same results to rounding, faster where `takes_onednn` says so.

    Example:
        >>> import torch
        >>> from perceiver_core.linear import Linear
        >>> layer, x = Linear(512, 256), torch.randn(64, 512)
        >>> torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    """

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """Input @ weight.T + bias."""
        if not takes_onednn(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        # torch.compile sees one node; in eager mode a Function costs less.
        product: Any = _product if torch.compiler.is_compiling() else _Product.apply
        out: Tensor = product(rows, self.weight, self.bias)
        return out.reshape(*input.shape[:-1], self.out_features)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `Linear` has oneDNN multiply these: in float32, on a CPU where it is faster, and much.

    Not while something looks on that knows PyTorch's ordinary operators alone: torch.export, torch.func, a trace, or a
    mode such as FlopCounterMode. Under torch.compile the size is looked at when the graph runs.
    """
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or checks.autocasting(x.device):
        return False
    if torch.compiler.is_compiling():
        return not is_exporting() and is_faster()
    if not is_faster() or torch._C._get_tracing_state() is not None or x.shape[-1] != weight.shape[-1]:
        return False
    if type(x) not in PLAIN or type(weight) not in PLAIN or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return False
    return _is_much(x.numel() // max(x.shape[-1], 1), *weight.shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # no processor comes while a graph is made
def is_faster() -> bool:
    """Whether oneDNN is known to multiply float32 matrices faster than MKL here: AVX-512 without Intel's name on it."""
    return _is_faster()


@cache
def _is_faster() -> bool:
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not both:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in _vendor()


def _vendor() -> str:
    """Who made the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "Intel, for all that is known")


def _multiplied(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """A @ b.T + bias by the faster library."""
    if not _is_much(a.shape[0], *b.shape):
        return F.linear(a, b, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_laid_out(a), _laid_out(b), bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    """a @ b.T + bias. Its gradients are such products too, so it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return _multiplied(a, b, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _gradients(ctx, gradient, _Product.apply)


# The same as an operator, for torch.compile. The schema is written out because it cannot be inferred where an import
# hook has wrapped the function.
_product = torch.library.custom_op(
    "perceiver_core::product", _multiplied, mutates_args=(), schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor"
)


@_product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(
    ctx: Any, gradient: Tensor, product: Any = _product
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (a, b), wanted = ctx.saved_tensors, ctx.needs_input_grad
    return (
        product(gradient, b.t(), None) if wanted[0] else None,
        product(gradient.t(), a.t(), None) if wanted[1] else None,
        gradient.sum(0) if wanted[2] else None,
    )


_product.register_autograd(_gradients, setup_context=_keep)


def _laid_out(x: Tensor) -> Tensor:
    """A matrix without gaps, by rows or by columns: with others oneDNN takes hundreds of times as long."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _is_much(rows: int, columns: int, terms: int) -> bool:
    return rows * columns * terms >= LITTLE and terms <= DEEP * max(rows, columns)
