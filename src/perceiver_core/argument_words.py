"""Descriptions of type annotations and of values, for error messages."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import AbstractArray
from torch import Tensor, nn

_WORDS: dict[Any, tuple[str, ...]] = {
    int: ("a whole number",),
    float: ("a number",),
    bool: ("True", "False"),
    str: ("a string",),
    type(None): ("None",),
    nn.Module: ("a module",),
    Tensor: ("a torch.Tensor",),
}


def describe(hint: Any, words: str) -> None:
    """Set the words that describe an annotation in error messages, such as "a function such as sharing.all_"."""
    _WORDS[hint] = (words,)


def expected(hint: Any) -> str:
    """Return a description of a type, such as "a whole number or None"."""
    *others, last = dict.fromkeys(_words(hint))
    return f"{', '.join(others)} or {last}" if others else last


def _words(hint: Any) -> Sequence[str]:
    """Return the alternatives that a type allows, each as a few words."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [word for part in parts for word in _words(part)]
    if origin is Callable:
        return ["a factory of modules (a class, function or functools.partial)" if is_factory(hint) else "a function"]
    if origin is type:
        return [f"a class of {expected(parts[0]).partition(' ')[2]}s"]
    if origin is Mapping:
        return [f"a dictionary whose values are each {expected(parts[1])}"]
    if origin in (Sequence, list, tuple):
        return [f"a sequence whose items are each {expected(parts[0])}" if parts else "a sequence"]
    if is_array_hint(hint):
        kind = {"Float": "floating-point ", "Int": "integer ", "Bool": "boolean "}.get(hint.dtype.__name__, "")
        return [f"a {kind}tensor ({hint.dim_str})"]
    if getattr(hint, "_is_protocol", False):
        members = sorted({*vars(hint), *getattr(hint, "__annotations__", {})})
        *others, last = [member for member in members if not member.startswith("_")]
        return [f"an object with {', '.join(others)} and {last}"]
    return (f"a {getattr(hint, '__name__', hint)}",)


def shown(value: object) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, type):
        return f"the class {value.__name__}. Build it first"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', '?')}"
    if isinstance(value, nn.Module):
        return f"a built {type(value).__name__}"
    try:
        return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
    except Exception:  # an uninitialized parameter has no shape, and repr of a user's object may raise
        return f"a {type(value).__name__}"


def is_array_hint(hint: Any) -> bool:
    """Return whether an annotation describes a tensor, such as `Float[Tensor, "b n c"]`."""
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def is_factory(hint: Any) -> bool:
    """Return whether an annotation describes a function that returns a module."""
    result = typing.get_args(hint)[-1:]
    return bool(result) and isinstance(result[0], type) and issubclass(result[0], nn.Module)
