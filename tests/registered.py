"""Tables of registered names that are restored after a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from perceiver_core import registry


@contextmanager
def restored() -> Iterator[None]:
    """Restores the tables of registered names at its end."""
    tables = (registry.names._named, registry.names._names, registry.names._external)
    before = [table.copy() for table in tables]
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
