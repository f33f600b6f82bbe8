"""Dictionaries of registered classes and functions, and helpers for error messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Json = Any  # any value that the json module reads and writes
TAGS = ("part", "partial", "name", "same", "dict")

_named: dict[str, Callable[..., object]] = {}
_names: dict[Callable[..., object], str] = {}
_external: dict[Any, tuple[str, ...]] = {}  # classes of other libraries, with the arguments that a file may set
_replaced: dict[str, int] = {}  # number of times that a local definition was replaced, keyed by name


def unregistered(label: str) -> str:
    """Return the error message for an unregistered class or function. Callers prepend its path in the configuration."""
    return (
        f"is {label}, which is not registered. "
        "Put @perceiver_core.register above its definition and make the model again; a class that is not yours, into a "
        "module of yours"
    )


def label(thing: object) -> str:
    """Return `module.qualname` of a class or function, or `<module.Class object>` for any other object."""
    of = type(thing)
    if not hasattr(thing, "__qualname__"):
        return f"<{of.__module__}.{of.__qualname__} object>"
    return f"{getattr(thing, '__module__', '?')}.{thing.__qualname__}"


def short(value: object) -> str:
    """Return the repr of a value as one line of at most 80 characters."""
    text = re.sub(r"\s*\n\s*", " ", f"{value!r}")
    return text if len(text) <= 80 else f"{text[:77]}..."
