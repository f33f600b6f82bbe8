"""Conversion of models to JSON configurations, and construction of models from configurations."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from perceiver_core.registry.names import TAGS, Json, _external, _named, _names, _replaced, label, short, unregistered
from perceiver_core.registry.snapshot import Node, Refusal, Thing, snapshot

_budget = threading.local()
_LONGEST_KEY, _LONGEST_REASON = 200, 1000  # characters in error messages


def to_config(value: object) -> Json:
    """Return the JSON configuration of a model or another value. `from_config` rebuilds the value from it.

    Raises:
        ValueError: If a class or function is not registered, or a value cannot be represented in JSON.

    Example:
        >>> from functools import partial
        >>> pc.registry.to_config(partial(pc.CrossAttend, num_heads=2))
        {'partial': 'CrossAttend', 'num_heads': 2}
    """
    return _written(snapshot(value), "", {})


def _written(node: Node, at: str, seen: dict[int, str]) -> Json:
    """Convert the snapshot `node` (see `registry.snapshot`) to JSON. `at` is the path of `node`.

    `seen` is a dictionary from `id(record)` to path, with one entry for each part (instance of a registered class) that
    was converted already. A repeated part is written as a reference to its first path. `seen` is updated in-place.
    """
    if isinstance(node, Refusal):
        raise ValueError(f"{at or 'the model'} {node.reason}")
    if isinstance(node, list):
        return [_written(item, _join(at, index), seen) for index, item in enumerate(node)]
    if isinstance(node, dict):
        return {"dict": _written_each(node, at, seen)}
    if not isinstance(node, Thing):
        return node
    if node.record is not None:
        if id(node.record) in seen:
            return {"same": seen[id(node.record)]}
        seen[id(node.record)] = at
    return {node.tag: _name_of(node, at), **_written_each(node.arguments, at, seen)}


def _name_of(thing: Thing, at: str) -> str:
    """Return the registered name of a class or function, even if `thing` was created before the registration."""
    name = thing.name
    if name is None and "<" not in thing.label:
        name = next((name for name, known in _named.items() if label(known) == thing.label), None)
    if name is None or name not in _named or _replaced.get(name, 0) != thing.replaced:
        raise ValueError(f"{at or 'the model'} {unregistered(thing.label)}")
    return name


def _written_each(nodes: Mapping[str, Node], at: str, seen: dict[int, str]) -> dict[str, Json]:
    return {key: _written(item, _join(at, key), seen) for key, item in nodes.items()}


def settings(module: nn.Module) -> str:
    """Return a module's class and settings as one line, to detect changes after construction.

    Settings in the class attribute `changes_no_result` are left out, because they do not affect the module's output.
    """
    of = type(module)
    if of in _names and of not in _external:
        free = getattr(of, "changes_no_result", ())
        names = [name for name in inspect.signature(of).parameters if name in vars(module) and name not in free]
        described = ", ".join(f"{name}={_config_or_type(vars(module)[name])}" for name in names)
    else:  # torch modules list settings in extra_repr; parameter lists and custom modules may also list the device
        listing = isinstance(module, (nn.ParameterDict, nn.ParameterList))
        described = module.extra_repr() if of.__module__.startswith("torch.") and not listing else ""
    return f"{label(of)}({described})"


def _config_or_type(value: object) -> Json:
    try:
        return to_config(value)
    except ValueError:
        return type(value).__name__


def from_config(config: Json) -> Any:
    """Build a model or another value from a configuration that `to_config` returned.

    Raises:
        ValueError: If a name is not registered, a class rejects its arguments, or the configuration is malformed.

    Example:
        >>> pc.registry.from_config({"part": "MLP", "dim": 32, "activation": {"part": "GEGLU"}}).expand.out_features
        64
    """
    try:
        return _build(config, "", {})
    except RecursionError as error:
        raise ValueError("the configuration is nested too deeply; no model is") from error


def _build(config: Json, at: str, built: dict[str, object]) -> object:
    if isinstance(config, list):
        return [_build(item, _join(at, index), built) for index, item in enumerate(config)]
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
        if not isinstance(named, str) or named not in built:
            raise ValueError(f"{at or 'the model'} is the same as {short(named)}, but no part stands there before it")
        return built[named]
    if tag == "dict":
        if not isinstance(named, dict):
            raise ValueError(f"{at or 'the model'} must hold an object under 'dict'; got {short(named)}")
        return _build_each(named, at, built)
    thing = _look_up(named, at)
    if tag == "name":
        return thing
    made = _make(thing, _build_each(rest, at, built), at, later=tag == "partial")
    # Partials are never shared: a chain of shared ones would build exponentially many modules.
    return built.setdefault(at, made) if tag == "part" else made


def _build_each(configs: dict[str, Json], at: str, built: dict[str, object]) -> dict[str, object]:
    return {key: _build(item, _join(at, key), built) for key, item in configs.items()}


def _look_up(name: object, at: str) -> Callable[..., object]:
    if not isinstance(name, str) or name not in _named:
        raise ValueError(
            f"{at or 'the model'} names {short(name)}, which is not registered. If it is your own, "
            "import the module that registers it before loading"
        )
    return _named[name]


def _make(thing: Callable[..., object], arguments: dict[str, object], at: str, *, later: bool) -> object:
    """Instantiate a registered class. If `later` is True, return a functools.partial of a class or function."""
    if thing in _external and not arguments.keys() <= set(_external[thing]):  # so that a file cannot set a device
        raise ValueError(
            f"{at or 'the model'} gives {_names[thing]} {short(sorted(arguments))}; "
            f"it may have {list(_external[thing])}"
        )
    if later:
        return functools.partial(thing, **arguments)
    if not inspect.isclass(thing):
        raise ValueError(f"{at or 'the model'} names {_names[thing]!r}, which is not a part but a function")
    _count()
    try:
        return thing(**arguments)
    except Exception as error:  # any type, because the arguments in a file may be arbitrary
        why = str(error).partition("\nException raised from")[0] or type(error).__name__  # without frames of C++
        raise ValueError(
            f"{at or 'the model'}: {_names[thing]} cannot be built from its configuration: "
            f"{_shortened(why, _LONGEST_REASON)}"
        ) from error


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Context manager that limits the number of modules that this thread can build from a configuration.

    Without a limit, a small malicious configuration could build a huge model.

    Args:
        modules: Limit of a combined count: one for each object that `from_config` builds, and one for each submodule
            that is registered in a module.

    Raises:
        ValueError: If the code in the context exceeds the limit.
    """
    _install_counter()
    before, _budget.left = getattr(_budget, "left", None), modules
    try:
        yield
    finally:
        _budget.left = before


@functools.cache
def _install_counter() -> None:
    # The hook is never removed, because removal would break the loop over hooks in a thread that is building a model.
    register_module_module_registration_hook(_count)


def _count(*_: object) -> None:
    left = getattr(_budget, "left", None)
    if left is not None:
        if left <= 0:
            raise ValueError("the configuration has more modules than the file has weights for")
        _budget.left = left - 1


def _join(at: str, key: object) -> str:
    """Append `key` to the path `at`. For example, "adapter" and "positions" become "adapter.positions".

    Paths appear in error messages, so keys are escaped and shortened: in a file, they may be long or contain control
    characters.
    """
    name = _shortened(str(key) if str(key).isprintable() else ascii(key), _LONGEST_KEY)
    return f"{at}.{name}" if at else name


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 2 :]}"
