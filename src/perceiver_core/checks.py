"""What an input must be, said before any work is done on it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def is_floating(name: str, x: Tensor) -> None:
    """Raises TypeError unless `x` is a floating point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it: torch.as_tensor(...)")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating point; got {x.dtype}. Convert and scale it, "
            f"8-bit pictures for example: {name}.float() / 255"
        )


def ids(name: str, x: Tensor, vocabulary: int) -> None:
    """Raises unless `x` is `b n` of whole numbers from 0 to `vocabulary` - 1; looked at as in `values`.

    Raises:
        TypeError: anything but an integer tensor.
        ValueError: another shape, no ids at all, or ids outside the vocabulary.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(x).__name__}. Convert it: torch.as_tensor(...) of numbers, "
            "adapters.Bytes.encode(...) of texts"
        )
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be whole numbers; got {x.dtype}. Convert it: {name}.long()")
    has_shape(name, x, "b n")
    below(name, x, vocabulary)


def below(name: str, x: Tensor, count: int) -> None:
    """Raises ValueError unless whole numbers lie in 0 ... count - 1; looked at as in `values`."""
    if (least_most := _seen(lambda: torch.stack(x.aminmax()).tolist(), x)) is None:
        return
    least, most = least_most
    if least < 0 or most >= count:
        raise ValueError(f"{name} must lie in 0 ... {count - 1}; got {least if least < 0 else most}")


def is_true(holds: Callable[[], Tensor], x: Tensor) -> bool:
    """Whether something holds of the values of `x`; yes where they are not looked at, see `values`."""
    return _seen(lambda: bool(holds()), x) is not False


def padded_on_the_left(name: str, mask: Tensor) -> None:
    """Raises ValueError unless each row of a mask `b n` is False, then True to the end; looked at as in `values`."""
    ends = _seen(lambda: torch.where(~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(1))[0].tolist(), mask)
    if ends:
        raise ValueError(
            f"{name} must be False for padding on the left, then True to the end, a token at least; "
            f"it is not in samples {ends[:10]}. Move padding to the front, as Bytes.encode(..., left=True) has it"
        )


def has_shape(name: str, x: Tensor, axes: str, *, last: int | None = None) -> None:
    """Raises ValueError unless `x` has the axes of `axes` ("b c h w"), none of them empty."""
    wanted = axes.split()
    if x.ndim != len(wanted):
        hint = f"; add a batch axis: {name}.unsqueeze(0)" if x.ndim == len(wanted) - 1 else ""
        raise ValueError(f"{name} must have {len(wanted)} axes ({axes}); got shape {tuple(x.shape)}{hint}")
    not_empty(name, x)
    if last is not None and x.shape[-1] != last:
        raise ValueError(f"{name} must have {last} features in its last axis ({axes}); got shape {tuple(x.shape)}")


def not_empty(name: str, x: Tensor) -> None:
    """Raises ValueError if any axis of `x` has size 0."""
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty; got shape {tuple(x.shape)}")


def has_channels(name: str, x: Tensor, axis: int, channels: int) -> None:
    """Raises ValueError unless axis `axis` of `x` has size `channels`."""
    if x.shape[axis] != channels:
        raise ValueError(
            f"{name} must have {channels} channels in axis {axis}; got {x.shape[axis]} (shape {tuple(x.shape)}). "
            f"Build the adapter with num_channels={x.shape[axis]}, or move the channel axis"
        )


def channels_first(name: str, x: Tensor, axes: str, num_channels: int, *, channel_axis: int = 1) -> None:
    """Raise unless `x` is floating point with the axes of `axes` ("b c h w"), none empty, and `num_channels` channels."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == len(axes.split()) and 0 not in x.shape:
        if x.shape[channel_axis] == num_channels:
            return
    is_floating(name, x)
    has_shape(name, x, axes)
    has_channels(name, x, channel_axis, num_channels)


def is_mask(name: str, mask: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raises unless `mask` is boolean and, where one is given, has exactly `shape`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, True = attend; got {got}. Convert it: {name}.bool()")
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, one value a token; got {tuple(mask.shape)}")


def leaves_a_token(mask: Tensor) -> None:
    """Raises ValueError if a mask `b *grid` leaves a sample no token; looked at as in `values`."""
    if empty := _seen(lambda: torch.where(~mask.flatten(1).any(1))[0].tolist(), mask):
        raise ValueError(f"mask leaves no token to attend to in samples {empty[:10]}; drop them or unmask a token")


def values(name: str, x: Tensor, mask: Tensor | None = None) -> None:
    """Raises ValueError if a sample has no token left, or a token that is attended to is NaN or infinite.

    Looks at values only where that is free of side effects: on the CPU, in eager mode. Elsewhere it
    would force a synchronization or break a graph, and a NaN shows in the output instead.

    Args:
        name: what to call `x` in the message.
        x: `b *grid c`.
        mask: `b *grid`, True = attend; other tokens may hold anything.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    if mask is not None:
        leaves_a_token(mask)
    try:
        # A sum is one pass without a temporary; it is finite only if all terms are, barring overflow.
        bad = not math.isfinite(x.sum(dtype=torch.float64).item())
        if bad:
            looked_at = x if mask is None else x[mask]
            bad = not bool(looked_at.isfinite().all())
    except RuntimeError:  # torch.func transforms and fake tensors have no values to look at
        return
    if bad:
        raise ValueError(f"{name} holds NaN or infinite values; clean it, or mask those tokens")


def _seen(look: Callable[[], T], x: Tensor) -> T | None:
    """What is found by looking at the values of `x`; None where that would have side effects, see `values`."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    try:
        return look()
    except RuntimeError:  # torch.func transforms and fake tensors have no values to look at
        return None


def matches_weight(name: str, x: Tensor, layer: object) -> None:
    """Raise unless `x` can be multiplied with the weight of `layer`: same device and, outside autocast, same dtype.

    A weight that is no plain tensor on a real device (quantized, sharded, offloaded, absent) is not compared.
    """
    weight = getattr(layer, "weight", layer)
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta" or not weight.is_floating_point():
        return
    if x.device != weight.device:
        raise ValueError(
            f"{name} is on {x.device}, the model on {weight.device}; move one: {name}.to({str(weight.device)!r})"
        )
    if x.dtype != weight.dtype and not (autocasting(x.device) and torch.float64 not in (x.dtype, weight.dtype)):
        raise TypeError(
            f"{name} is {x.dtype}, the model {weight.dtype}; "
            f"convert one ({name}.to({weight.dtype})), or use torch.autocast"
        )


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch would multiply `x`: its own, or autocast's."""
    converts = autocasting(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if converts else x.dtype


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast: what follows chooses its dtypes itself."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def positive(*, at_most: int | None = None, **sizes: int) -> None:
    """Raises ValueError unless every named size is a whole number of at least 1, and at most `at_most`.

    Whole numbers are those that Python takes as an index, NumPy's for example; not booleans, and not tensors.
    """
    for name, size in sizes.items():
        if not _is_whole(size) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {size!r}")
        if at_most is not None and size > at_most:
            raise ValueError(f"{name} must be at most {at_most}; got {size}")


def _is_whole(size: object) -> bool:
    if isinstance(size, int):
        return not isinstance(size, bool)
    try:
        return not isinstance(size, Tensor) and operator.index(size) is not None  # type: ignore[arg-type]
    except TypeError:
        return False


def part_of(n: int, share: float) -> int:
    """The whole part of a share of n, and not one less where the product of floats falls short of a whole number.

    Example:
        >>> from perceiver_core import checks
        >>> int(10 * (1 - 0.8)), checks.part_of(10, 1 - 0.8)
        (1, 2)
    """
    return int(n * share + 1e-9)


def probability(**rates: float) -> None:
    """Raises ValueError unless every named rate lies in [0, 1)."""
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must lie in [0, 1); got {rate!r}")
