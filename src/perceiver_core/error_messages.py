"""Context managers that add the path of the file to error messages, and escape control characters in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

LONGEST_MESSAGE = 1500  # characters; files may contain names of any length
_TYPES = (FileNotFoundError, OSError, ImportError, TypeError, ValueError)  # not their subclasses in other libraries


@contextmanager
def errors_of(subject: str) -> Iterator[None]:
    """Context manager that converts any exception to a ValueError whose message begins with `subject`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{subject}: {error}") from error


@contextmanager
def errors_with_path(source: object) -> Iterator[None]:
    """Context manager that adds a path to the message of a ValueError that does not contain it.

    It has no effect if `source` is not a path but, for example, a state dict.
    """
    try:
        yield
    except ValueError as error:
        if not isinstance(source, (str, PathLike)) or str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


@contextmanager
def printable_errors() -> Iterator[None]:
    """Context manager that escapes control characters in error messages and shortens long messages.

    Messages quote names of files and tensors, which may be untrusted. Unescaped, they could clear a terminal or imitate
    its output. A changed message replaces the error and its causes by one error of the same type.
    """
    try:
        yield
    except _TYPES as error:
        text = str(error)
        if type(error) not in _TYPES or (clean := printable(text)) == text:
            raise
        raise type(error)(clean) from None


def printable(text: str) -> str:
    r"""Return `text` with escapes instead of characters that are not printable, shortened if it is long.

    Example:
        >>> print(printable("layer" + chr(27)))
        layer\x1b
    """
    if len(text) > LONGEST_MESSAGE:
        start, end = text[: LONGEST_MESSAGE - 400], text[-300:]
        text = f"{start} ... ({len(text) - len(start) - len(end)} characters) ... {end}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
