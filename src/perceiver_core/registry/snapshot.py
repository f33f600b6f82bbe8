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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import is_
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perceiver_core.registry.names import _external, _names, _replaced, label, short, unregistered

RECORD = "_arguments"  # the attribute of a part that holds its record
_SCALARS = (int, float, str, bool, type(None))
_LONGEST = 2**19  # items; a configuration, of at most 2**20 bytes, cannot hold more


@dataclass(eq=False)
class Record:
    """Constructor arguments of a part, by name. Two references are to the same part if their records are identical."""

    arguments: dict[str, Node]


@dataclass(frozen=True)
class Attribute:
    """Reference to the module that a part has in an attribute when it is saved."""

    path: str  # dotted, such as "layers.0"
    several: bool = False  # whether it is a ModuleList or ModuleDict, of an argument that was a list or dictionary


@dataclass(frozen=True)
class Thing:
    """An instance of a registered class (tag "part"), a functools.partial ("partial"), or a class or function ("name").

    The class or function was registered under `name`, or not (None), when it was described.
    """

    tag: str
    label: str
    name: str | None
    replaced: int  # number of times that another definition had taken over the name by then
    arguments: dict[str, Node]
    record: Record | None  # of a part


@dataclass(frozen=True)
class Refusal:
    """A value that a configuration cannot contain, with the error message of `to_config`, without the path."""

    reason: str


Node: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | Thing | Attribute | Refusal | None"


def snapshot(value: Any, paths: Mapping[int, str] | None = None) -> Node:
    """Return the current state of a value as data.

    Parts are described by the constructor arguments that give their current state, or as an `Attribute` if `paths` has
    their identity. A value that cannot be described becomes a `Refusal`: a model with it can be used, copied and
    pickled, but not saved.
    """
    value = plain(value, mappings=True)
    if value is None or isinstance(value, torch.Generator):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # plain also for subclasses, such as enumerations
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, list | tuple):
        return [snapshot(item, paths) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return _each(value, paths)
    if paths and id(value) in paths:
        return Attribute(paths[id(value)])
    return _partial(value) if isinstance(value, functools.partial) else _thing(value)


def _number(value: float) -> Node:
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else _no_word(value)


class _Described(threading.local):
    """Partials that have been described, by identity, while a part is built; they are held so that no id is reused."""

    partials: dict[int, tuple[functools.partial[object], Node]] | None = None


_described = _Described()


@contextmanager
def each_partial_once() -> Iterator[None]:
    """Inside the context, describe a partial that is passed to many parts only once, so that deep models build fast."""
    before = _described.partials
    _described.partials = {} if before is None else before
    try:
        yield
    finally:
        _described.partials = before


def _partial(value: functools.partial[object]) -> Node:
    known = {} if _described.partials is None else _described.partials
    if id(value) not in known:
        node: Node = _refer("partial", value.func, _each(value.keywords))
        if value.args:
            node = Refusal(f"is a functools.partial of positional arguments; name them: {_shown(value):.60}")
        known[id(value)] = value, node
    return known[id(value)][1]


def _thing(value: Any) -> Node:
    """Describe a part, class, function, or number of another library."""
    if type(value) in _external:
        found = {name: getattr(value, name) for name in _external[type(value)]}
        given = {name: item is not None if name == "bias" else item for name, item in found.items()}
        return _refer("part", type(value), _each(given), vars(value).setdefault(RECORD, Record({})))
    if type(value) in _names:
        record = vars(value).get(RECORD)
        if record is None:
            return Refusal(f"was built before {label(type(value))} was registered; build it again")
        arguments = {name: _current(value, node) for name, node in record.arguments.items()}
        return _refer("part", type(value), arguments, record)
    if inspect.isclass(value) or inspect.isroutine(value):
        return _refer("name", value, {})
    if isinstance(value, nn.Module):
        return Refusal(unregistered(label(type(value))))
    if type(value) is Tensor:
        is_number = value.ndim == 0 and value.device.type == "cpu" and not value.is_complex()
        return snapshot(value.item()) if is_number else _no_word(value)
    try:
        return operator.index(value)
    except TypeError:  # no whole number
        return _no_word(value)


def _refer(tag: str, thing: Any, arguments: dict[str, Node], record: Record | None = None) -> Thing:
    known = (inspect.isclass(thing) or inspect.isroutine(thing)) and thing in _names  # others may not be hashable
    name = _names[thing] if known else None
    return Thing(tag, label(thing), name, 0 if name is None else _replaced.get(name, 0), arguments, record)


def _each(values: Mapping[str, object], paths: Mapping[int, str] | None = None) -> dict[str, Node]:
    return {key: snapshot(item, paths) for key, item in values.items()}


def _current(part: object, node: Node) -> Node:
    """Return a recorded argument with the paths of attributes replaced by their values."""
    if isinstance(node, list):
        return [_current(part, item) for item in node]
    if isinstance(node, dict):
        return {key: _current(part, item) for key, item in node.items()}
    if not isinstance(node, Attribute):
        return node
    now = functools.reduce(lambda held, name: getattr(held, name, None), node.path.split("."), part)
    if node.several and isinstance(now, nn.ModuleList | nn.ModuleDict):
        return [snapshot(module) for module in now] if isinstance(now, nn.ModuleList) else _each(dict(now.items()))
    if isinstance(now, nn.Module):
        return snapshot(now)
    return Refusal(
        f"is a module passed to {type(part).__name__}, which has none in its attribute {node.path!r} now. "
        "Put a module there, nn.Identity() for none"
    )


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


def plain(value: Any, *, mappings: bool = False) -> Any:
    """Convert NumPy numbers and the containers of configuration libraries in a value to Python's built-in types.

    Converted are scalars of NumPy, its arrays of at most one axis, and sequences that are neither lists nor tuples if
    all they hold is numbers, strings, None and containers of these (those of OmegaConf, for example); with `mappings`,
    mappings that are no dictionaries too, which constructors may read by attributes. Lists, tuples and dictionaries are
    searched. Anything else is returned as it is.
    """
    if isinstance(value, np.generic | np.ndarray):
        return _of_numpy(value)
    if type(value) in (list, tuple):
        items = [plain(item, mappings=mappings) for item in value]
        return value if all(map(is_, items, value)) else type(value)(items)
    if type(value) is dict:
        found = {key: plain(item, mappings=mappings) for key, item in value.items()}
        return value if all(map(is_, found.values(), value.values())) else found
    if isinstance(value, (str, bytes, bytearray, memoryview, list, tuple, dict)):
        return value
    if isinstance(value, Sequence) or (mappings and isinstance(value, Mapping)):
        return _of_container(value, mappings)
    return value


def _of_numpy(value: np.generic | NDArray[np.generic]) -> object:
    if value.ndim > 1 or value.dtype.kind not in "biufU":
        return value
    if value.dtype.kind == "f":
        value = value.astype(np.float64)  # Python has no number for a longdouble
    return value.tolist()


def _of_container(value: Sequence[object] | Mapping[object, object], mappings: bool) -> object:
    """Return a list or a dictionary; the container as it is if it holds anything but plain values."""
    found: dict[object, object] = {}
    try:
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in islice(pairs, _LONGEST + 1):  # not all at once: a sequence may compute its items slowly
            found[key] = plain(item, mappings=mappings)
            if len(found) > _LONGEST or not all(isinstance(leaf, _SCALARS) for leaf in leaves(found[key])):
                return value
    except Exception:  # a container whose items cannot be read, of a configuration that is not filled in
        return value
    return found if isinstance(value, Mapping) else list(found.values())


def leaves(value: object) -> Iterator[object]:
    """Yield the values inside lists, tuples and dictionaries."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value
