"""Snapshots: descriptions of constructor arguments as plain data, without references to modules, closures or arrays.

Each part (an instance of a registered class) has a `Record` of its constructor arguments. Descriptions refer to this
object. Two descriptions that refer to the same `Record` object describe the same part, not two equal parts. A deep copy
of a part has its own record.
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

RECORD = "_arguments"  # name of the attribute that holds a part's record
_SCALARS = (int, float, str, bool, type(None))
_LONGEST = 2**19  # maximum number of items in a container; a configuration of at most 2**20 bytes cannot have more


@dataclass(eq=False)
class Record:
    """Constructor arguments of a part (an instance of a registered class), keyed by argument name.

    Descriptions that refer to the same `Record` object describe the same part.
    """

    arguments: dict[str, Node]


@dataclass(frozen=True)
class Attribute:
    """Placeholder for a constructor argument that is a module: the path of the attribute that holds the module.

    `save` describes the module that the attribute holds at that time.
    """

    path: str  # dotted, such as "layers.0"
    several: bool = False  # True for a ModuleList or ModuleDict if the argument was a list or dictionary


@dataclass(frozen=True)
class Thing:
    """Description of an instance of a registered class, a functools.partial, a class, or a function.

    `tag` is "part" for an instance, "partial" for a functools.partial, and "name" for a class or function. `name` is
    the registered name of the class or function, or None if it was not registered when the description was made.
    """

    tag: str
    label: str
    name: str | None
    replaced: int  # number of times that the definition with this name was replaced before the description was made
    arguments: dict[str, Node]
    record: Record | None  # None unless this describes a part


@dataclass(frozen=True)
class Refusal:
    """Placeholder for a value that a configuration cannot contain. `to_config` raises an error with `reason`."""

    reason: str


Node: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | Thing | Attribute | Refusal | None"


def snapshot(value: Any, paths: Mapping[int, str] | None = None) -> Node:
    """Describe the current state of a value as plain data.

    An instance of a registered class is described by the constructor arguments that reproduce its current state. If
    `paths` maps the id of a module to an attribute path, the module is described by an `Attribute` with this path. A
    value that cannot be described becomes a `Refusal`. A model with such a value can be used, copied and pickled, but
    not saved.
    """
    value = plain(value, mappings=True)
    if value is None or isinstance(value, torch.Generator):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # converts subclasses, such as enumerations, to str
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
    """Thread-local cache of the descriptions of functools.partials, keyed by id.

    The cache also holds the partials themselves, so that their ids are not reused.
    """

    partials: dict[int, tuple[functools.partial[object], Node]] | None = None


_described = _Described()


@contextmanager
def each_partial_once() -> Iterator[None]:
    """Context manager in which each functools.partial is described only once, to speed up building deep models."""
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
    """Describe an instance of a registered class, a class, a function, a scalar tensor, or an integer-like object."""
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
    except TypeError:  # not an integer
        return _no_word(value)


def _refer(tag: str, thing: Any, arguments: dict[str, Node], record: Record | None = None) -> Thing:
    known = (inspect.isclass(thing) or inspect.isroutine(thing)) and thing in _names  # others may be unhashable
    name = _names[thing] if known else None
    return Thing(tag, label(thing), name, 0 if name is None else _replaced.get(name, 0), arguments, record)


def _each(values: Mapping[str, object], paths: Mapping[int, str] | None = None) -> dict[str, Node]:
    return {key: snapshot(item, paths) for key, item in values.items()}


def _current(part: object, node: Node) -> Node:
    """Replace each `Attribute` in a recorded argument by a description of the module that the attribute holds now."""
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
    """Convert NumPy values and containers of configuration libraries to Python's built-in types.

    Values in lists, tuples and dictionaries are converted recursively. NumPy scalars and arrays with at most one axis
    are converted if they are boolean, integer, floating-point or text. Sequences of other types, such as OmegaConf's
    lists, are converted to lists if they contain only numbers, strings, None, parts, and containers of these. If
    `mappings` is True, mappings of other types are converted to dictionaries in the same way. (It is False for the
    arguments of constructors, because a constructor may access the keys of a mapping as attributes.) Mappings that
    OmegaConf created from a registered dataclass are converted back to the dataclass. All other values are returned
    unchanged.
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
    if isinstance(value, Mapping) and (part := _dataclass_of(value)) in _names:
        return part(**plain(dict(value), mappings=mappings))
    if isinstance(value, Sequence) or (mappings and isinstance(value, Mapping)):
        return _of_container(value, mappings)
    return value


def _of_numpy(value: np.generic | NDArray[np.generic]) -> object:
    if value.ndim > 1 or value.dtype.kind not in "biufU":
        return value
    if value.dtype.kind == "f":
        value = value.astype(np.float64)  # Python has no longdouble type
    return value.tolist()


def _of_container(value: Sequence[object] | Mapping[object, object], mappings: bool) -> object:
    """Convert a sequence to a list, or a mapping to a dictionary.

    It is returned unchanged if it contains anything but numbers, strings, None, parts, and containers of these.
    """
    found: dict[object, object] = {}
    try:
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in islice(pairs, _LONGEST + 1):  # one by one, because a sequence may compute its items slowly
            found[key] = plain(item, mappings=mappings)
            if len(found) > _LONGEST or not all(map(_is_scalar_or_part, leaves(found[key]))):
                return value
    except Exception:  # an item that cannot be read, such as a missing value of a configuration
        return value
    return found if isinstance(value, Mapping) else list(found.values())


def _dataclass_of(value: Mapping[object, object]) -> Any:
    """Return the class of the dataclass object from which OmegaConf created a mapping; None for other mappings."""
    kind = getattr(vars(value).get("_metadata"), "object_type", None) if hasattr(value, "__dict__") else None
    return kind if inspect.isclass(kind) else None


def _is_scalar_or_part(value: object) -> bool:
    return isinstance(value, (*_SCALARS, nn.Module, functools.partial)) or type(value) in _names


def leaves(value: object) -> Iterator[object]:
    """Yield all values in nested lists, tuples and dictionaries, or `value` itself if it is none of these."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value
