"""Values as data: descriptions of arguments that keep no module, closure or array alive.

A part carries a `Record` of its constructor's arguments. The record is copied and pickled with the part, so that its
identity distinguishes two uses of one part from two equal parts, even if the part itself is not available.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_core.registry.names import Reference, _external, _names, label, refer, short, unregistered
from perceiver_core.registry.plain import plain

RECORD = "_arguments"  # the attribute of a part that holds its record


@dataclass(eq=False)
class Record:
    """Constructor arguments of a part, by name. Two references are to the same part if their records are identical."""

    arguments: dict[str, Node]


@dataclass(frozen=True)
class Attribute:
    """Reference to the module that a part has in an attribute when it is saved.

    Args:
        path: Dotted path of the attribute, such as "layers.0".
        several: Whether it is a ModuleList or ModuleDict of an argument that was a list or dictionary of modules.
    """

    path: str
    several: bool = False


@dataclass(frozen=True)
class Part:
    """Instance of a registered class."""

    reference: Reference
    record: Record
    arguments: dict[str, Node]


@dataclass(frozen=True)
class Partial:
    """A functools.partial of a class or function."""

    reference: Reference
    arguments: dict[str, Node]


@dataclass(frozen=True)
class Refusal:
    """A value that a configuration cannot contain, with the error message of `to_config`, without the path."""

    reason: str


Node: TypeAlias = (
    "bool | int | float | str | list[Node] | dict[str, Node] | Reference | Part | Partial | Attribute | Refusal | None"
)


def snapshot(value: object) -> Node:
    """Return the current state of a value as data.

    Parts are described by the constructor arguments that give their current state. A value that cannot be described
    becomes a `Refusal`: a model with it can be used, copied and pickled, but not saved.
    """
    value = plain(value, mappings=True)
    if value is None or isinstance(value, torch.Generator):
        return None
    if isinstance(value, bool | int | float | str):
        return _scalar(value)
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return _each(value)
    if isinstance(value, functools.partial):
        return _partial(value)
    if type(value) in _names:
        return _part(value)
    if inspect.isclass(value) or inspect.isroutine(value):
        return refer(value)
    if isinstance(value, nn.Module):
        return Refusal(unregistered(label(type(value))))
    number = _number(value)
    return _no_word(value) if number is None else snapshot(number)


def _each(values: dict[str, object]) -> dict[str, Node]:
    return {key: snapshot(item) for key, item in values.items()}


def _scalar(value: bool | int | float | str) -> Node:
    """Return a plain number or string, also for subclasses (enumerations)."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    return float(value) if math.isfinite(value) else _no_word(value)


class _Described(threading.local):
    """Partials that have been described, by identity, while a part is built; they are held so that no id is reused."""

    partials: dict[int, tuple[functools.partial[object], Node]] | None = None


_described = _Described()


@contextmanager
def each_partial_once() -> Iterator[None]:
    """Inside the context, describe a partial that is passed to many parts only once, so that deep models build fast."""
    if _described.partials is not None:
        yield
        return
    _described.partials = {}
    try:
        yield
    finally:
        _described.partials = None


def _partial(value: functools.partial[object]) -> Node:
    known = _described.partials
    if known is not None and id(value) in known:
        return known[id(value)][1]
    if value.args:
        node: Node = Refusal(f"is a functools.partial of positional arguments; name them: {_shown(value):.60}")
    else:
        node = Partial(refer(value.func), _each(value.keywords))
    if known is not None:
        known[id(value)] = value, node
    return node


def _part(part: object) -> Node:
    """Describe an instance of a registered class by the constructor arguments that rebuild it in its current state."""
    if type(part) in _external:
        found = {name: getattr(part, name) for name in _external[type(part)]}
        given = {name: value is not None if name == "bias" else value for name, value in found.items()}
        return Part(refer(type(part)), vars(part).setdefault(RECORD, Record({})), _each(given))
    record = vars(part).get(RECORD)
    if record is None:
        return Refusal(f"was built before {label(type(part))} was registered; build it again")
    return Part(refer(type(part)), record, {name: _current(part, node) for name, node in record.arguments.items()})


def _current(part: object, node: Node) -> Node:
    """Return a recorded argument with the paths of attributes replaced by their values."""
    if isinstance(node, list):
        return [_current(part, item) for item in node]
    if isinstance(node, dict):
        return {key: _current(part, item) for key, item in node.items()}
    if not isinstance(node, Attribute):
        return node
    now = attribute(part, node.path)
    if node.several and isinstance(now, nn.ModuleList):
        return [snapshot(module) for module in now]
    if node.several and isinstance(now, nn.ModuleDict):
        return _each(dict(now.items()))
    if isinstance(now, nn.Module):
        return snapshot(now)
    return Refusal(
        f"is a module passed to {type(part).__name__}, which has none in its attribute {node.path!r} now. "
        "Put a module there, nn.Identity() for none"
    )


def attribute(part: object, path: str) -> object:
    """Return the attribute of a part at a dotted path such as "layers.0"; None if it does not exist."""
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _number(value: object) -> int | float | None:
    """Convert a number of another library to a Python number; return None for anything else."""
    if type(value) is Tensor:
        is_number = value.ndim == 0 and value.device.type == "cpu" and not value.is_complex()
        return value.item() if is_number else None
    try:
        return operator.index(value) if isinstance(value, SupportsIndex) else None
    except TypeError:  # an array of several numbers
        return None


def _no_word(value: object) -> Refusal:
    return Refusal(
        f"is {_shown(value)}, which JSON cannot represent. Give numbers, strings, None, lists, "
        "dictionaries with names for keys, or registered parts"
    )


def _shown(value: object) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    try:
        return short(value)
    except Exception:  # repr of a user's object may raise
        return f"a {type(value).__name__}"
