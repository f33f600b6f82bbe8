"""Random choices of one case: sizes, options, tensors and constructor calls, one of which may get an invalid argument.

All constructor calls of a case go through `Draw.make` (a module) or `Draw.later` (a factory), and its forward calls
through `Draw.call`. They are recorded for the message of an escape, and one of them gets an invalid argument if the
case is drawn to have one.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_core import Tokens

INVALID_SHARE = 0.3  # cases with one invalid argument
INVALID_CALL = 0.15  # probability that a call gets it, if no earlier call did
DTYPES = (*(torch.float64,) * 3, *(torch.float32,) * 3, torch.bfloat16)


class Invalid(NamedTuple):
    """Argument that was replaced, the call that it belongs to, and the names of all arguments of that call."""

    name: str
    call: str
    names: tuple[str, ...]


class Draw:
    """Source of all random choices of one case."""

    def __init__(self, source: random.Random, *, invalid: bool | None = None) -> None:
        self.random = source
        self.generator = torch.Generator().manual_seed(source.randrange(2**31))
        self.batch = self.choice(0, 1, 1, 2, 2, 3)
        self.dtype: torch.dtype = self.choice(*DTYPES)
        self.calls: list[str] = []
        self.used: set[str] = set()
        self.names: tuple[str, ...] = ()  # arguments of the current call
        self.invalid: Invalid | None = None
        self.wants_invalid = self.flag(INVALID_SHARE) if invalid is None else invalid

    def choice(self, *options: Any) -> Any:
        return self.random.choice(options)

    def flag(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def size(self, low: int = 1, high: int = 7) -> int:
        """Draw a small size."""
        return self.random.randint(low, high)

    def width(self, high: int) -> int:
        """Draw a vector width. In low precision it is at least 2: a norm of one channel hides or amplifies errors."""
        return 1 if self.flag(0.15) and self.dtype == torch.float64 else self.random.randint(2, high)

    def tensor(self, *shape: int) -> Tensor:
        """Draw numbers in [-1, 1], in float64."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 2 - 1

    def integers(self, count: int, *shape: int) -> Tensor:
        dtype = self.choice(torch.long, torch.long, torch.int32, torch.uint8) if count <= 256 else torch.long
        return torch.randint(count, shape, generator=self.generator).to(dtype)

    def mask(self, *grid: int, empty: bool = False) -> Tensor | None:
        """Draw a mask `b *grid` in which each sample has a valid token, or none at all if `empty`."""
        shape, kind = (self.batch, *grid), self.choice("none", "none", "some", "one", "left", "all")
        if kind == "none":
            return None
        count = int(np.prod(grid))
        first = torch.randint(count, (self.batch, 1), generator=self.generator)
        index = torch.arange(count)
        if kind == "left":
            valid = index >= first
        else:
            rate = {"some": 0.6, "one": 0.0, "all": 1.0}[kind]
            valid = (torch.rand(self.batch, count, generator=self.generator) < rate) | (index == first)
        if empty and self.batch and self.flag(0.3):
            valid[0] = False
        return valid.reshape(shape)

    def make(self, thing: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a constructor or function."""
        args, kwargs = self._recorded(thing, args, kwargs)
        return thing(*args, **kwargs)

    def later(self, thing: Callable[..., Any], **kwargs: Any) -> Any:
        """Return a factory, which is the class itself if there are no arguments."""
        _, kwargs = self._recorded(thing, (), kwargs)
        return partial(thing, **kwargs) if kwargs else thing

    def call(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Record the arguments of a forward call, and return them."""
        return self._recorded(model.forward, args, kwargs, label=f"{type(model).__name__}.forward")

    def _recorded(
        self, thing: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], label: str = ""
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        label = label or getattr(thing, "__name__", str(thing))
        self.names = tuple(inspect.signature(thing).parameters)
        self.used.add(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}")
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if given and self.wants_invalid and self.invalid is None and self.flag(INVALID_CALL):
            name = self.choice(*given)
            self.invalid = Invalid(name, label, self.names)
            value = invalid_value(self, name, given[name])
            args = tuple(value if own == name else x for own, x in zip(self.names, args, strict=False))
            kwargs = {own: value if own == name else x for own, x in kwargs.items()}
            given[name] = value
        self.calls.append(f"{label}({', '.join(f'{name}={shown(x)}' for name, x in given.items())})")
        return args, dict(kwargs)


def shown(value: object) -> str:
    """Return a short description of an argument."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Tokens):
        return f"Tokens({shown(value.content)}, {len(value.position_tables)} tables, mask={shown(value.mask)})"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, partial):
        return f"partial({', '.join([value.func.__name__, *(f'{k}={shown(v)}' for k, v in value.keywords.items())])})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return getattr(value, "__name__", repr(value)[:80])


def invalid_value(draw: Draw, name: str, value: Any) -> Any:
    """Return a value that is invalid for most arguments of this type."""
    if isinstance(value, Tensor):
        return invalid_tensor(draw, value)
    if isinstance(value, bool):
        return draw.choice(None, "yes", 2, ())
    if isinstance(value, int):
        return draw.choice(0, -1, 1.5, "3", None, (), [value], float("nan"), True, torch.tensor(value))
    if isinstance(value, float):
        return draw.choice(-0.5, float("nan"), float("inf"), "0.5", None, (), 1j, [value])
    if isinstance(value, nn.Module):
        return draw.choice(None, type(value), "module", 3, [value])
    if isinstance(value, Mapping):
        first = next(iter(value), "x")
        return draw.choice(
            {},
            list(value),
            3,
            "x",
            {"a.b": value.get(first)},
            {1: value.get(first)},
            {**value, "unknown": value.get(first)},
        )
    if isinstance(value, Sequence):
        return draw.choice(
            None, (), [*value, *value], 1.5, "ab", [None] * len(value), [0] * len(value), [1.5] * len(value)
        )
    if callable(value):
        return draw.choice("module", 3, (), *[nn.Identity()] * (name != "kernel"))
    return draw.choice("x", 3, 1.5, (), object())


def invalid_tensor(draw: Draw, x: Tensor) -> Any:
    """Return an invalid replacement of a tensor: another type, dtype, shape, device or value."""
    options: list[Any] = [x.tolist(), "x", x[None], x.to(torch.complex64), x[..., None], x.to("meta")]
    if x.ndim:
        options += [x[..., :0], x.sum(0) if x.dtype != torch.bool else x.any(0), torch.cat([x, x], -1)]
    if x.is_floating_point():
        options += [x.long(), x.double() if x.dtype != torch.float64 else x.float(), torch.full_like(x, float("nan"))]
    elif x.dtype == torch.bool:
        options += [x.float(), x.long(), torch.zeros_like(x)]
    else:
        options += [x.double(), x.bool(), x.long() - 1000, x.long() + 1000]
    return draw.choice(*options)
