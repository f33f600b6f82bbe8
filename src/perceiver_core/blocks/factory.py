"""Helpers that call factories. A factory is a callable that builds a submodule, such as the argument `norm=`."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

from torch import nn

from perceiver_core import argument_types
from perceiver_core.registry.keywords import check_keywords
from perceiver_core.sharing import Shared

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def build(name: str, factory: Callable[..., M], *args: object, **kwargs: object) -> M:
    """Call a factory of modules. Modules in a `functools.partial` are copied, so that each call builds its own.

    Modules wrapped in `sharing.Shared` are not copied, so that all blocks share them.

    Args:
        name: Name of the factory in error messages.
        factory: Factory to call.
        args: Positional arguments of the factory.
        kwargs: Keyword arguments of the factory.

    Raises:
        TypeError: If the factory is not callable or is a module, cannot be called with the arguments, or does not
            return a module.

    Example:
        >>> from functools import partial
        >>> from perceiver_core.blocks.factory import build
        >>> attention = partial(pc.MultiHeadAttention, rotary=pc.positions.Rotary())
        >>> first, second = build("attention", attention, 16), build("attention", attention, 16)
        >>> first.rotary is second.rotary
        False
        >>> rotary = pc.positions.Rotary()
        >>> attention = partial(pc.MultiHeadAttention, rotary=pc.sharing.Shared(rotary))
        >>> build("attention", attention, 16).rotary is build("attention", attention, 16).rotary is rotary
        True
    """
    made = call(name, factory, *args, **kwargs)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} must be a factory that returns a module; it returned {argument_types.shown(made)}")
    return made


def call(name: str, factory: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call a factory as `build` does, without a check of the result."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{name} must be a factory: a class, a function or a functools.partial, such as "
            f"partial(CrossAttend, num_heads=1); got a built {type(factory).__name__}"
        )
    called = _renewed(factory, unwrap=True) if isinstance(factory, partial) else factory
    try:
        return cast(T, called(*args, **kwargs))
    except TypeError as error:
        if isinstance(factory, partial):
            check_keywords(factory.func, factory.keywords)
        _check_takes(name, called, args, kwargs, error)
        raise  # an error of the constructor itself


def _check_takes(
    name: str, factory: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], error: TypeError
) -> None:
    """Raise a TypeError that names the argument if a factory cannot be called with these arguments."""
    shown = ", ".join([*map(argument_types.shown, args), *(f"{key}={value!r:.60}" for key, value in kwargs.items())])
    try:
        inspect.signature(factory).bind(*args, **kwargs)
    except TypeError as reason:
        called = getattr(factory, "__name__", type(factory).__name__)
        raise TypeError(f"{name} must be a factory to be called with ({shown}); {called} cannot: {reason}") from error
    except ValueError:  # some classes of C extensions have no signature
        raise TypeError(f"{name} must be a factory to be called with ({shown}): {error}") from error


def _renewed(value: Any, *, unwrap: bool) -> Any:
    """Return `value` with all modules inside it deep-copied, except modules wrapped in `Shared`.

    Partials, lists and tuples without modules are returned unchanged. If `unwrap` is True, each `Shared` wrapper is
    replaced by its module, except inside nested partials. Those are passed to `build` later and unwrapped then.
    """
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if isinstance(value, Shared):
        return value.module if unwrap else value
    if isinstance(value, partial):
        func = _renewed(value.func, unwrap=unwrap)
        args = [_renewed_item(item, unwrap=unwrap) for item in value.args]
        keywords = {name: _renewed_item(item, unwrap=unwrap) for name, item in value.keywords.items()}
        old, new = (value.func, *value.args, *value.keywords.values()), (func, *args, *keywords.values())
        return value if all(map(operator.is_, old, new)) else partial(func, *args, **keywords)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        items = [_renewed_item(item, unwrap=unwrap) for item in value]
        return value if all(map(operator.is_, value, items)) else type(value)(items)
    if isinstance(value, dict):
        return {key: _renewed_item(item, unwrap=unwrap) for key, item in value.items()}
    return value


def _renewed_item(value: Any, *, unwrap: bool) -> Any:
    return _renewed(value, unwrap=unwrap and not isinstance(value, partial))


def takes_argument(function: Callable[..., object], name: str) -> bool:
    """Return whether a function accepts a keyword argument with this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.name == name or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
