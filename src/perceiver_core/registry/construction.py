"""Construction of values from configurations, by calls of registered classes, with a limit on their number."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook

from perceiver_core.registry.names import TAGS, Json, _external, _names, join, look_up, short

_budget = threading.local()


def from_config(config: Json) -> Any:
    """Build a value from its configuration; see `to_config`.

    Raises:
        ValueError: A name that is not registered, arguments that do not fit, or a malformed configuration.

    Example:
        >>> import perceiver_core as pc
        >>> pc.registry.from_config({"part": "MLP", "dim": 32, "activation": {"part": "GEGLU"}}).expand.out_features
        64
    """
    try:
        return _build(config, "", {})
    except RecursionError as error:
        raise ValueError("the configuration is nested too deeply; no model is") from error


def _build(config: Json, at: str, built: dict[str, object]) -> object:
    if isinstance(config, list):
        return [_build(item, join(at, index), built) for index, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    tags = [tag for tag in TAGS if tag in config]
    if len(tags) != 1:
        raise ValueError(f"{at or 'the model'} must hold exactly one of {TAGS}; found {short(sorted(config)[:5])}")
    tag, named = tags[0], config[tags[0]]
    rest = {key: item for key, item in config.items() if key != tag}
    if tag in ("name", "same", "dict") and rest:
        raise ValueError(f"{at or 'the model'} must hold {tag!r} alone; found {short(sorted(rest)[:5])} beside it")
    if tag == "same":
        return _earlier(named, at, built)
    if tag == "dict":
        if not isinstance(named, dict):
            raise ValueError(f"{at or 'the model'} must hold an object under 'dict'; got {short(named)}")
        return {key: _build(item, join(at, key), built) for key, item in named.items()}
    thing = look_up(named, at)
    arguments = {key: _build(item, join(at, key), built) for key, item in rest.items()}
    if tag == "name":
        return thing
    _check_external(thing, arguments, at)
    if tag == "partial":
        return functools.partial(thing, **arguments)
    built[at] = _make(thing, arguments, at)
    return built[at]


def _earlier(path: object, at: str, built: dict[str, object]) -> object:
    if not isinstance(path, str) or path not in built:
        raise ValueError(f"{at or 'the model'} is the same as {short(path)}, but no part stands there before it")
    return built[path]


def _make(thing: Callable[..., object], arguments: dict[str, object], at: str) -> object:
    if not inspect.isclass(thing):
        raise ValueError(f"{at or 'the model'} names {_names[thing]!r}, which is not a part but a function")
    _count()
    try:
        return thing(**arguments)
    except Exception as error:  # of any type: a file may pass arguments to constructors that no caller would pass
        why = str(error) or type(error).__name__
        raise ValueError(
            f"{at or 'the model'}: {_names[thing]} cannot be built from its configuration: {why}"
        ) from error


def _check_external(thing: Callable[..., object], arguments: dict[str, object], at: str) -> None:
    """Raise ValueError for arguments of other libraries' classes that a file must not choose, such as a device."""
    if inspect.isclass(thing) and thing in _external and not arguments.keys() <= set(_external[thing]):
        raise ValueError(
            f"{at or 'the model'} gives {_names[thing]} {short(sorted(arguments))}; "
            f"it may have {list(_external[thing])}"
        )


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Limit the number of modules that this thread builds or registers, so that a small file cannot build many.

    Raises:
        ValueError: The code in the context exceeds the limit.
    """
    _install_counter()
    before, _budget.left = getattr(_budget, "left", None), modules
    try:
        yield
    finally:
        _budget.left = before


@functools.cache
def _install_counter() -> None:
    # Stays: removing a hook while another thread builds a model would break the loop over hooks there.
    register_module_module_registration_hook(_count)


def _count(*_: object) -> None:
    left = getattr(_budget, "left", None)
    if left is not None:
        if left <= 0:
            raise ValueError("the configuration has more modules than the file has weights for")
        _budget.left = left - 1
