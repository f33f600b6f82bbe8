"""Input checks, and helpers for autocast, torch.func, forward-mode AD and export.

Unless stated otherwise, checks raise TypeError for a wrong type or dtype, and ValueError for all other errors. `name`
is the name of the argument in error messages.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def is_floating(name: str, x: object) -> None:
    """Check that `x` is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it: torch.as_tensor(...)")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating point; got {x.dtype}. Convert and scale it, "
            f"8-bit images for example: {name}.float() / 255"
        )


def is_real(name: str, x: object) -> None:
    """Check that `x` is a tensor of boolean, integer or floating-point values, not of complex numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it: torch.as_tensor(...)")
    if x.is_complex():
        raise TypeError(f"{name} must be real; got {x.dtype}. Pass {name}.real or {name}.abs()")


def attention_inputs(**tensors: Tensor) -> None:
    """Check that each argument is a floating-point tensor with the axes (batch, head, token, channel)."""
    for name, x in tensors.items():
        if not (isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()):
            is_floating(name, x)
            raise ValueError(f"{name} must have the axes (batch, head, token, channel); got shape {tuple(x.shape)}")


def ids(name: str, x: Tensor, vocab_size: int) -> None:
    """Check that `x` is an integer tensor `b n` with values in 0 ... vocab_size - 1.

    The range is checked only on the CPU in eager mode; see `values`.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it: torch.as_tensor(...) of numbers, "
            "adapters.Bytes.encode(...) of texts"
        )
    whole_numbers(name, x)
    has_shape(name, x, "b n")
    below(name, x, vocab_size)


def whole_numbers(name: str, x: object) -> Tensor:
    """Check that `x` is an integer tensor, and return it as int64."""
    if not isinstance(x, Tensor) or x.dtype not in _WHOLE:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be whole numbers; got {got}. Convert it: {name}.long()")
    return x.long()


def below(name: str, x: Tensor, count: int) -> None:
    """Check that integers are in 0 ... count - 1. The check runs only on the CPU in eager mode; see `values`."""
    bounds = _inspect(x, lambda: torch.stack(x.aminmax()).tolist())
    if bounds and (bounds[0] < 0 or bounds[1] >= count):
        raise ValueError(f"{name} must lie in 0 ... {count - 1}; got {bounds[0] if bounds[0] < 0 else bounds[1]}")


def is_true(condition: Callable[[], Tensor | bool], x: Tensor) -> bool:
    """Return whether a condition on the values of `x` holds.

    The condition is evaluated only on the CPU in eager mode; see `values`. Otherwise, return True.
    """
    return _inspect(x, lambda: bool(condition())) is not False


def padded_on_the_left(name: str, mask: Tensor) -> None:
    """Check that each row of a mask `b n` has False values (padding) only on the left, and at least one True value.

    The check runs only on the CPU in eager mode; see `values`.
    """
    bad = _inspect(mask, lambda: torch.where(~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(1))[0].tolist())
    if bad:
        raise ValueError(
            f"{name} must be False for padding on the left, then True to the end, with at least one token; it "
            f'is not in samples {bad[:10]}. Move padding to the front, as Bytes.encode(..., padding_side="left") does'
        )


def has_shape(name: str, x: Tensor, axes: str, *, last: int | None = None) -> None:
    """Check that `x` has one axis per name in `axes` ("b c h w"), and that no axis except the batch axis "b" is empty.

    If `last` is set, check that the last axis has size `last`.
    """
    expected = axes.split()
    if x.ndim != len(expected):
        hint = f"; add a batch axis: {name}.unsqueeze(0)" if x.ndim == len(expected) - 1 else ""
        raise ValueError(f"{name} must have {len(expected)} axes ({axes}); got shape {tuple(x.shape)}{hint}")
    not_empty(name, x, start=int(expected[0] == "b"))
    if last is not None and x.shape[-1] != last:
        raise ValueError(f"{name} must have {last} features in its last axis ({axes}); got shape {tuple(x.shape)}")


def not_empty(name: str, x: Tensor, *, start: int = 1) -> None:
    """Check that no axis of `x` from axis `start` on has size 0. By default, only the batch size may be 0."""
    if 0 in x.shape[start:]:
        raise ValueError(f"{name} must not be empty; got shape {tuple(x.shape)}")


def has_channels(name: str, x: Tensor, axis: int, num_channels: int) -> None:
    """Check that axis `axis` of `x` has size `num_channels`."""
    if x.shape[axis] != num_channels:
        raise ValueError(
            f"{name} must have {num_channels} channels in axis {axis}; got {x.shape[axis]} (shape {tuple(x.shape)}). "
            f"Build the adapter with num_channels={x.shape[axis]}, or move the channel axis"
        )


def channels_first(name: str, x: Tensor, axes: str, num_channels: int, *, channel_axis: int = 1) -> None:
    """Check that `x` is floating point, with `num_channels` channels and the axes named in `axes` ("b c h w")."""
    shape = x.shape if isinstance(x, Tensor) and x.is_floating_point() else ()
    if len(shape) == len(axes.split()) and 0 not in shape[1:] and shape[channel_axis] == num_channels:
        return
    is_floating(name, x)
    has_shape(name, x, axes)
    has_channels(name, x, channel_axis, num_channels)


def is_mask(name: str, mask: object, shape: Sequence[int] | None = None) -> None:
    """Check that `mask` is a dense boolean tensor. If `shape` is set, check that it is the shape of the mask."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, True = attend; got {got}. Convert it: {name}.bool()")
    if not torch.compiler.is_compiling() and mask.layout is not torch.strided:
        raise ValueError(f"{name} must be dense; got the layout {mask.layout}. Convert it: {name}.to_dense()")
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, one value a token; got {tuple(mask.shape)}")


def leaves_a_token(mask: Tensor) -> None:
    """Check that a mask `b *grid` has at least one valid token (True) in every sample.

    The check runs only on the CPU in eager mode; see `values`.
    """
    if empty := _inspect(mask, lambda: torch.where(~mask.flatten(1).any(1))[0].tolist()):
        raise ValueError(f"mask leaves no token to attend to in samples {empty[:10]}; drop them or unmask a token")


def values(name: str, x: Tensor, mask: Tensor | None = None) -> None:
    """Check that every sample has a valid token, and that no valid token contains NaN or infinity.

    `x` has shape `b *grid c` and `mask` has shape `b *grid`. Masked tokens may have any values. The check runs only on
    the CPU in eager mode, because on a GPU it would force a synchronization, and under torch.compile a graph break.
    NaN then appears in the output instead.
    """

    def is_invalid() -> bool:
        if mask is not None:
            leaves_a_token(mask)
        # A sum needs one pass and no temporary. If it is finite, all terms are finite.
        if math.isfinite(x.sum(dtype=torch.float64).item()):
            return False
        return not bool((x if mask is None else x[mask]).isfinite().all())

    if _inspect(x, is_invalid):
        raise ValueError(f"{name} holds NaN or infinite values; clean it, or mask those tokens")


def _inspect(x: Tensor, function: Callable[[], T]) -> T | None:
    """Call `function`, which reads the values of `x`, and return its result.

    The call is made only on the CPU in eager mode; see `values`. Otherwise, return None.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    try:
        return function()
    except RuntimeError:  # tensors of torch.func transforms and fake tensors have no values
        return None


def converts(layer: nn.Module) -> bool:
    """Return whether pre-forward hooks or a replaced `forward` may convert the weights or the input of a layer."""
    state = layer.__dict__
    return bool(state.get("_forward_pre_hooks")) or "forward" in state


def matches_weight(name: str, x: Tensor, layer: object) -> None:
    """Check that `x` and the weight of `layer` are on the same device and, outside autocast, have the same dtype.

    The check is skipped if the layer has hooks that may convert it (see `converts`), or if its weight is missing,
    quantized, sharded or offloaded (on the meta device).
    """
    if isinstance(layer, nn.Module) and converts(layer):
        return
    weight: Any = getattr(layer, "weight", layer)
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return
    if x.device != weight.device:
        same_device(name, x, weight)
    if x.dtype != weight.dtype and not (autocasting(x.device) and torch.float64 not in (x.dtype, weight.dtype)):
        raise TypeError(
            f"{name} is {x.dtype}, the model {weight.dtype}; "
            f"convert one ({name}.to({weight.dtype})), or use torch.autocast"
        )


def same_device(name: str, x: Tensor, weight: Tensor) -> None:
    """Check that `x` is on the device of a weight of the model, unless the weight is offloaded (on the meta device)."""
    if x.device != weight.device and not weight.is_meta:
        raise ValueError(
            f"{name} is on {x.device}, the model on {weight.device}; move one: {name}.to({str(weight.device)!r})"
        )


def autocasting(device: torch.device) -> bool:
    """Return whether torch.autocast is enabled for a device. Always False for the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with `x`: the autocast dtype if autocast applies, else `x.dtype`."""
    converts = autocasting(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if converts else x.dtype


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager that disables autocast on a device. It does nothing on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def positive(*, at_most: int | None = None, **sizes: int) -> None:
    """Check that every size is an integer from 1 to `at_most` (None for no limit). Raise ValueError if not.

    NumPy integers and other objects with an `__index__` method count as integers. Booleans and tensors do not.
    """
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {size!r}")
        if operator.index(size) >= 2**31:
            raise ValueError(f"{name} must be below 2**31; got {size!r:.60}")
        if at_most is not None and size > at_most:
            raise ValueError(f"{name} must be at most {at_most}; got {size}")


def is_integer(size: object) -> bool:
    """Return whether a value is a whole number: an object with `__index__`, but neither a boolean nor a tensor."""
    if isinstance(size, (int, np.bool_)):
        return isinstance(size, int) and not isinstance(size, bool)
    try:
        return isinstance(size, SupportsIndex) and not isinstance(size, Tensor) and operator.index(size) is not None
    except TypeError:
        return False


def part_of(n: int, share: float) -> int:
    """Return `n * share` rounded down, up to rounding errors: 2 for 10 * (1 - 0.8), which is 1.9999999999999996."""
    return int(n * share + 1e-9)


def probability(**rates: float) -> None:
    """Check that every rate is in [0, 1)."""
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must lie in [0, 1); got {rate!r}")
