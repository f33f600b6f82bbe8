"""Whether a graph is being traced or exported, and whether a transform of torch.func is active."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

P = ParamSpec("P")
T = TypeVar("T")


def constant_under_compile(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function whose result torch.compile treats as a constant.

    This is `torch.compiler.assume_constant_result` without its import of the compiler, which takes about a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transformed() -> bool:
    """Return whether a torch.func transform or forward-mode AD is active. Always False under torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_more_derivatives() -> bool:
    """Return whether forward-mode AD or nested torch.func derivatives are active, which fused kernels do not support.

    Always False under torch.compile. Second derivatives without torch.func cannot be detected in the forward pass.
    """
    if not transformed():
        return False
    keys = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return forward_ad._current_level >= 0 or TransformType.Jvp in keys or keys.count(TransformType.Grad) > 1


@constant_under_compile
def is_exporting() -> bool:
    """Return whether torch.export is tracing a graph, including calls within torch.onnx.export.

    PyTorch's flag is read directly, because `torch.compiler.is_exporting` is missing in PyTorch 2.6 and, in some later
    versions, also True under torch.compile. With PyTorch 2.6, the result is True in non-strict export only.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", torch.compiler._is_compiling_flag))


def always(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes holds. Under torch.export, it must hold for all values of dynamic sizes.

    A plain `if` would restrict the exported program to sizes that give the same result as those of the example inputs.
    """
    if not is_exporting():
        return True if condition else False  # noqa: SIM210 (PyTorch 2.6 does not compile bool)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return bool(statically_known_true(condition))
