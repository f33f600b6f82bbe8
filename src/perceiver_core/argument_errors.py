"""Errors of a failed call in terms of its arguments.

A call with a wrong tensor usually fails inside PyTorch, with a message about an operator that the caller does not know.
`explained` catches such errors and names the argument that does not have its annotated type, number of axes or size. A
call that succeeds is not checked, so correct code pays only for one more Python function call.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_origin

import einops
import numpy
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from perceiver_core import argument_types
from perceiver_core.argument_types import check, hints_of, is_array_hint, shown

P = ParamSpec("P")
T = TypeVar("T")
_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
# Words in errors of PyTorch about tensors that do not fit, and in errors that have other reasons.
_MISFIT = re.compile(
    """
    shape|size|dimension|dtype|type|expected|match|device|mat1|index|range|bound|argument|contiguous|sparse|layout|
    could.not.run|implemented|support|meta.tensor|axes|complex|subscript|attribute|iterable|operand|unpack|bool|has.no|
    division|non-empty|overflow|storage|must.be|invalid|too.many|has.to.be|ambiguous
    """,
    re.IGNORECASE | re.VERBOSE,
)
_OTHER = re.compile(r"of memory|alloc|cuda error|nccl|differentiable|in-?place|timeout", re.IGNORECASE)
_STANDARD = f"{Path(str(functools.__file__)).parent}/"
_LIBRARIES = tuple(f"{Path(str(module.__file__)).parent}/" for module in (argument_types, torch, einops, numpy))


def explained(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function or method so that errors of wrong arguments name the argument.

    Errors that name an argument, and errors that no argument explains, are raised unchanged.

    Example:
        >>> try:
        ...     pc.MLP(8)(torch.randn(2, 3, 7))
        ... except ValueError as error:
        ...     print(str(error).partition(".")[0], "...")
        arguments do not fit MLP ...
    """

    @functools.wraps(function)
    def explaining(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_dynamo_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except _ERRORS as error:
            better = _explanation(function, args, kwargs, error)
            if better is None:
                raise
            raise better from error

    explaining.__signature__ = inspect.signature(function)  # type: ignore[attr-defined] # for callers that do not follow wrappers
    return explaining


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that each call first checks the arguments against their annotations; see `argument_types`.

    Errors of the call itself are those of `explained`. Not for functions that run in every forward pass.

    Example:
        >>> from perceiver_core.argument_errors import checked
        >>> @checked
        ... def half(size: int) -> int:
        ...     return size // 2
        >>> half("3")
        Traceback (most recent call last):
        ...
        ValueError: size must be a whole number; got '3'
    """
    signature, call = inspect.signature(function), explained(function)
    several = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints = functools.cache(lambda: {name: hint for name, hint in hints_of(function).items() if name not in several})

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the call below explains it better
            return function(*args, **kwargs)
        check(given, hints())
        return call(*args, **kwargs)

    checking.__signature__ = signature  # type: ignore[attr-defined]
    return checking


def _explanation(
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    error: Exception,
) -> Exception | None:
    """Return an error that names a wrong argument, or None if there is none."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # Python's error names the argument
        return None
    arguments = {name: value for name, value in given.items() if name != "self"}
    named = any(re.search(rf"\b{name}\b", str(error)) for name in arguments)
    if isinstance(error, torch.OutOfMemoryError) or (named and isinstance(error, (TypeError, ValueError))):
        return None
    hints, (files, is_deliberate) = hints_of(function), _origin(error)
    if not all(map(_is_library, files[:-1])):  # an error of a module of the user, called by a module of this library
        return None
    try:
        check(arguments, hints)
    except (TypeError, ValueError) as better:
        return better
    if is_deliberate and files[-1].startswith(_LIBRARIES[0]):  # an error in words, but perhaps about another argument
        return _size_error(arguments, hints) if isinstance(error, ValueError) else None
    if not files[-1].startswith(_LIBRARIES):
        return None
    return _size_error(arguments, hints) or _misfit(function, arguments, error)


def _origin(error: Exception) -> tuple[list[str], bool]:
    """Return the files of all frames, up to the one that raised an error, and whether a `raise` statement did so."""
    frames, frame = [], error.__traceback__
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    if not frames:
        return [""], False
    code = frames[-1].tb_frame.f_code
    is_deliberate = code.co_code[frames[-1].tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return [frame.tb_frame.f_code.co_filename for frame in frames], is_deliberate


def _is_library(file: str) -> bool:
    """Return whether a file belongs to this library, one that it uses, or Python."""
    return file.startswith((*_LIBRARIES, "<")) or (file.startswith(_STANDARD) and "site-packages" not in file)


def _size_error(arguments: Mapping[str, object], hints: Mapping[str, Any]) -> ValueError | None:
    """Return an error if two arguments have different sizes along an axis with the same name."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in arguments.items():
        for axis, size in _axes(value, hints.get(name)):
            known, other = sizes.setdefault(axis, (size, name))
            if size != known and 1 not in (size, known):
                return ValueError(
                    f"{name} must have the same size as {other} along axis {axis}, {known}; got {size} "
                    f"(shape {tuple(cast(Tensor, value).shape)})"
                )
    return None


def _axes(value: object, hint: Any) -> Iterator[tuple[str, int]]:
    """Yield the name and size of each named axis of an argument, if the annotation has a fixed number of axes."""
    for option in (hint, *get_args(hint)) if get_origin(hint) is not None else (hint,):
        if isinstance(value, Tensor) and is_array_hint(option):
            names = option.dim_str.replace("#", "").split()
            if len(names) == value.ndim and not any(name.startswith(("*", "...")) for name in names):
                yield from zip(names, value.shape, strict=True)
                return


def _misfit(function: Callable[..., object], arguments: Mapping[str, object], error: Exception) -> Exception | None:
    """Return an error that lists the arguments, with the message of an error about tensors that do not fit."""
    reason = str(error).partition("\nException raised from")[0].strip().partition("\n")[0]
    if _OTHER.search(reason[:200]) or not (_MISFIT.search(reason) or isinstance(error, (LookupError, AssertionError))):
        return None
    shapes = [f"{name} {_described(value)}" for name, value in arguments.items() if value is not None]
    if not shapes:
        return None
    name = getattr(function, "__qualname__", "the call")
    kind = TypeError if isinstance(error, (AttributeError, TypeError, NotImplementedError)) else ValueError
    return kind(f"arguments do not fit {name}: {'; '.join(shapes)}. {reason:.300}")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"has shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    is_plain = isinstance(value, (bool, int, float, complex, str, bytes, type)) or not hasattr(value, "__dict__")
    return f"is {shown(value)}" if is_plain else f"is a {type(value).__name__}"
