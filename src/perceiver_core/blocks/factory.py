"""Helpers that call factories. A factory is a callable that builds a submodule, such as the argument `norm=`."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn

from perceiver_core.registry.keywords import check_keywords
from perceiver_core.sharing import Shared

T = TypeVar("T")


def build(factory: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call a factory. Modules inside a `functools.partial` are copied, so that each call builds independent modules.

    Modules wrapped in `sharing.Shared` are not copied, so that all blocks share them.

    Example:
        >>> from functools import partial
        >>> from perceiver_core.blocks.factory import build
        >>> attention = partial(pc.MultiHeadAttention, rotary=pc.positions.Rotary())
        >>> first, second = build(attention, 16), build(attention, 16)
        >>> first.rotary is second.rotary
        False
        >>> rotary = pc.positions.Rotary()
        >>> attention = partial(pc.MultiHeadAttention, rotary=pc.sharing.Shared(rotary))
        >>> build(attention, 16).rotary is build(attention, 16).rotary is rotary
        True
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            "a factory must be a class, a function or a functools.partial, such as partial(CrossAttend, num_heads=1); "
            f"got a built {type(factory).__name__}"
        )
    if not isinstance(factory, partial):
        return factory(*args, **kwargs)
    renewed: partial[T] = _renewed(factory, unwrap=True)
    try:
        return renewed(*args, **kwargs)
    except TypeError:
        check_keywords(factory.func, factory.keywords)
        raise  # an error of the constructor itself


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
