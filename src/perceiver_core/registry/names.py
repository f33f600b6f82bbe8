"""Tables of registered classes and functions, and references to them by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = Any  # what the json module reads and writes
TAGS = ("part", "partial", "name", "same", "dict")

_named: dict[str, Callable[..., object]] = {}
_names: dict[Callable[..., object], str] = {}
_external: dict[type, tuple[str, ...]] = {}  # for classes of other libraries, the arguments that a file may set
_replaced: dict[str, int] = {}  # for names of local definitions, the number of times that another one took the name


@dataclass(frozen=True)
class Reference:
    """Reference to a class or function that does not keep it alive.

    Args:
        label: Its module and qualified name.
        name: Its registered name; None if it was not registered when the reference was created.
        replaced: Number of times that the name had been taken over by then.
    """

    label: str
    name: str | None
    replaced: int


def enter(thing: Callable[..., object], name: str) -> None:
    """Add a class or function to the tables; raise ValueError if its name is taken by another."""
    taken = _named.get(name)
    if taken is not None and label(taken) != label(thing):
        raise ValueError(
            f"name {name!r} is taken by {label(taken)}; register {label(thing)} with another: register(..., name='...')"
        )
    if taken is not None and taken is not thing and "<locals>" in taken.__qualname__:
        # The same text with other variables around it is not the same thing.
        _names.pop(taken, None)
        _replaced[name] = _replaced.get(name, 0) + 1
    _named[name], _names[thing] = thing, name


def refer(thing: Callable[..., object]) -> Reference:
    """Return a reference to a class, a function or another callable."""
    known = (inspect.isclass(thing) or inspect.isroutine(thing)) and thing in _names
    name = _names[thing] if known else None
    return Reference(label(thing), name, 0 if name is None else _replaced.get(name, 0))


def name_of(reference: Reference, at: str) -> str:
    """Return the registered name of a reference at a path of the model; it may have been registered since.

    Raises:
        ValueError: It is not registered, or another local definition has taken its name since.
    """
    name = reference.name
    if name is None and "<" not in reference.label:
        name = next((name for name, thing in _named.items() if label(thing) == reference.label), None)
    if name is None or name not in _named or _replaced.get(name, 0) != reference.replaced:
        raise ValueError(f"{at or 'the model'} {unregistered(reference.label)}")
    return name


def look_up(name: object, at: str) -> Callable[..., object]:
    """Return the class or function of a registered name, or raise ValueError."""
    if not isinstance(name, str) or name not in _named:
        raise ValueError(
            f"{at or 'the model'} names {short(name)}, which is not registered. If it is your own, "
            "import the module that registers it before loading"
        )
    return _named[name]


def unregistered(label: str) -> str:
    """Return the error message for a class or function that is not registered, without the path of the value."""
    return (
        f"is {label}, which is not registered. "
        "Put @perceiver_core.register above its definition and make the model again; a class that is not yours, into a "
        "module of yours"
    )


def label(thing: object) -> str:
    """Return the module and qualified name of a class or function; of anything else those of its class."""
    of = type(thing)
    if not hasattr(thing, "__qualname__"):
        return f"<{of.__module__}.{of.__qualname__} object>"
    return f"{getattr(thing, '__module__', '?')}.{thing.__qualname__}"


def short(value: object) -> str:
    """Return the representation of a value, in a line of at most 80 characters."""
    text = re.sub(r"\s*\n\s*", " ", f"{value!r}")
    return text if len(text) <= 80 else f"{text[:77]}..."


def join(at: str, key: object) -> str:
    """Return the path of an item inside a path."""
    return f"{at}.{key}" if at else f"{key}"
