"""Checks of arguments against the type annotations of a function.

The annotations are the only description of the accepted types. Numbers must also be finite and of plausible size:
an `int` is a whole number below 2**31, and a `float` is a real number of at most 1e30 in absolute value, so products in
float32 do not overflow. Ranges are checked by the functions themselves (see `checks`).
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.argument_words import describe, expected, is_array_hint, is_factory, shown

__all__ = [
    "check",
    "check_fields",
    "check_one",
    "describe",
    "hints_of",
    "index",
    "is_array_hint",
    "is_size",
    "shown",
    "sizes",
]

LARGEST = 2**31 - 1  # of whole numbers: a tensor of more rows would not fit into any memory
LARGEST_REAL = 1e30  # of real numbers; for an int, 2**53, up to which floats are exact


class RefusedError(Exception):
    """Raised internally for a refused value. It contains the error to raise, which names the argument.

    Args:
        error: Error to raise.
        is_type: True if the value has the wrong type. False if an item of it is refused, or a number is out of range.
    """

    def __init__(self, error: Exception, *, is_type: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.is_type = error, is_type


def hints_of(function: Callable[..., object]) -> dict[str, Any]:
    """Return the annotation of each parameter of a function or constructor that has one.

    Annotations that cannot be evaluated are left out, for example those of names that are imported for type checkers
    only.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions of C extensions have no signature
        return {}
    function = inspect.unwrap(function)
    given = {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if name in parameters}
    return {name: hint for name in given if (hint := _evaluated(function, name, given[name])) is not None}


def _evaluated(function: Callable[..., object], name: str, hint: object) -> Any:
    def one() -> None: ...

    one.__annotations__ = {name: hint}
    try:
        return typing.get_type_hints(one, getattr(function, "__globals__", {}))[name]
    except (NameError, TypeError, AttributeError):
        return None


def check(arguments: Mapping[str, object], hints: Mapping[str, Any]) -> None:
    """Check that each argument has the annotated type. `hints` is the result of `hints_of`.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a number is not whole where an `int` is annotated, or is NaN, infinite, or at least 2**31.
    """
    for name, value in arguments.items():
        if name in hints and (refused := _error(name, value, hints[name])) is not None:
            raise refused.error


def check_fields(instance: object) -> None:
    """Check the fields of a dataclass against their annotations; to be called in `__post_init__`."""
    check(vars(instance), _fields(cast(Any, type(instance))))


@functools.cache
def _fields(cls: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}


def check_one(name: str, value: object, hint: Any) -> None:
    """Raise `RefusedError` if `value` does not have the type `hint`."""
    hint = (hint.__bound__ or object) if isinstance(hint, TypeVar) else hint
    special = _CHECKS.get(typing.get_origin(hint)) or _CHECKS.get(hint)
    if special is not None:
        special(name, value, hint)
    elif is_array_hint(hint):
        _check_array(name, value, hint)
    elif isinstance(hint, type) and hint is not object:
        _require(_is_instance(value, hint), name, value, hint)


def _check_union(name: str, value: object, hint: Any) -> None:
    errors = [error for part in typing.get_args(hint) if (error := _error(name, value, part)) is not None]
    if len(errors) == len(typing.get_args(hint)):
        for error in errors:
            if not error.is_type:  # more specific than that of the whole union
                raise error
        kind = ValueError if any(isinstance(error.error, ValueError) for error in errors) else TypeError
        raise RefusedError(kind(f"{name} must be {expected(hint)}; got {shown(value)}"), is_type=True)


def _error(name: str, value: object, hint: Any) -> RefusedError | None:
    try:
        check_one(name, value, hint)
    except RefusedError as refused:
        return refused
    return None


def _check_item(name: str, value: object, hint: Any) -> None:
    if (error := _error(name, value, hint)) is not None:
        raise RefusedError(error.error)


def _check_none(name: str, value: object, hint: Any) -> None:
    _require(value is None, name, value, hint)


def _check_flag(name: str, value: object, hint: Any) -> None:
    _require(isinstance(value, (bool, np.bool_)), name, value, hint)


def _check_whole(name: str, value: object, hint: Any) -> None:
    if not checks.is_integer(value):
        raise RefusedError(ValueError(f"{name} must be a whole number; got {shown(value)}"), is_type=True)
    if abs(int(cast(int, value))) > LARGEST:
        raise RefusedError(ValueError(f"{name} must be below 2**31; got {value!r:.60}"))


def _check_real(name: str, value: object, hint: Any) -> None:
    _require(isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)), name, value, hint)
    if not isinstance(value, (int, float, np.number)):  # such as a Fraction, which PyTorch does not take
        raise RefusedError(TypeError(f"{name} must be a number; got {shown(value)}. Convert it: float({name})"))
    number, largest = (value, 2**53) if isinstance(value, int) else (float(cast(float, value)), LARGEST_REAL)
    if not abs(number) <= largest:  # NaN fails, too
        limit = f" of at most {largest:.0e}" if abs(number) < math.inf else ""
        raise RefusedError(ValueError(f"{name} must be a finite number{limit}; got {value!r:.60}"))


_TEXTS = (str, bytes, bytearray, memoryview)  # sequences of characters or bytes, not of numbers


def _check_sequence(name: str, value: object, hint: Any) -> None:
    parts = typing.get_args(hint)
    _require(isinstance(value, (Sequence, nn.ModuleList)) and not isinstance(value, _TEXTS), name, value, hint)
    if len(parts) == 1 or (len(parts) == 2 and parts[1] is Ellipsis):
        for index, item in enumerate(cast(Iterable[object], value)):
            _check_item(f"{name}[{index}]", item, parts[0])


def _check_mapping(name: str, value: object, hint: Any) -> None:
    key_hint, item_hint = typing.get_args(hint)
    _require(isinstance(value, Mapping), name, value, hint)
    for key, item in cast(Mapping[object, object], value).items():
        if key_hint is str and not isinstance(key, str):
            raise RefusedError(TypeError(f"{name} must have strings as keys; got {key!r:.60}"))
        _check_item(f"{name}[{key!r}]", item, item_hint)


def _check_callable(name: str, value: object, hint: Any) -> None:
    _require(callable(value) and not (is_factory(hint) and isinstance(value, nn.Module)), name, value, hint)


def _check_class(name: str, value: object, hint: Any) -> None:
    _require(isinstance(value, type) and issubclass(value, typing.get_args(hint)[0]), name, value, hint)


_CHECKS: dict[Any, Callable[[str, object, Any], None]] = {
    **dict.fromkeys((typing.Union, types.UnionType), _check_union),
    **dict.fromkeys((Sequence, list, tuple), _check_sequence),
    Mapping: _check_mapping,
    Callable: _check_callable,
    type: _check_class,
    type(None): _check_none,
    bool: _check_flag,
    int: _check_whole,
    float: _check_real,
}


def _check_array(name: str, value: object, hint: Any) -> None:
    """Check that a tensor has a dtype of the right kind and the right number of axes. Sizes are not checked."""
    if not isinstance(value, Tensor):
        raise RefusedError(TypeError(f"{name} must be a torch.Tensor; got {shown(value)}"), is_type=True)
    dtype = str(value.dtype).removeprefix("torch.")
    allowed = hint.dtypes if isinstance(hint.dtypes, (list, tuple)) else None
    if allowed and not any(dtype == kind if isinstance(kind, str) else kind.match(dtype) for kind in allowed):
        kind = hint.dtype.__name__.lower()
        raise RefusedError(TypeError(f"{name} must have a dtype of the kind {kind}; got {value.dtype}"), is_type=True)
    axes = hint.dim_str.split()
    several = any(axis.lstrip("#").startswith(("*", "...")) for axis in axes)
    if len(axes) - several > value.ndim or (not several and len(axes) != value.ndim):
        got = f"got shape {tuple(value.shape)}"
        raise RefusedError(ValueError(f"{name} must have the axes ({' '.join(axes)}); {got}"), is_type=True)


def _is_instance(value: object, hint: type) -> bool:
    if isinstance(value, type):  # a class that has the attributes of a protocol, but is no instance of it
        return hint is type
    try:
        return isinstance(value, hint)
    except TypeError:  # a protocol that cannot be checked
        return True


def _require(condition: bool, name: str, value: object, hint: Any) -> None:
    if not condition:
        raise RefusedError(TypeError(f"{name} must be {expected(hint)}; got {shown(value)}"), is_type=True)


def sizes(*, least: int = 0, **values: object) -> None:
    """Check that every argument is a whole number of at least `least`.

    The check is cheap, for functions that run in every forward pass.
    """
    for name, value in values.items():
        if not is_size(value, least):
            raise ValueError(f"{name} must be a whole number of at least {least}; got {shown(value)}")


def is_size(value: object, least: int = 0) -> bool:
    """Return whether `value` is a whole number of at least `least`.

    The size of a tensor in a graph that is being traced is accepted without a check, which would fix its value.
    """
    if type(value) is int:
        return value >= least
    if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and torch._C._get_tracing_state() is not None):
        return True
    return checks.is_integer(value) and operator.index(cast(typing.SupportsIndex, value)) >= least


def index(name: str, value: object, count: int) -> int:
    """Check that `value` is an index in -count ... count - 1, and return it as an index in 0 ... count - 1."""
    if not checks.is_integer(value):
        raise TypeError(f"{name} must be an index, a whole number; got {value!r:.80}")
    number = operator.index(cast(typing.SupportsIndex, value))
    if not -count <= number < count:
        raise ValueError(f"{name} must lie in {-count} ... {count - 1}; got {number:.3g}")
    return number % count
