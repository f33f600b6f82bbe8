"""Files of Haiku's parameters: what they hold, by `scope/parameter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perceiver_core.checkpoints import npz, restricted
from perceiver_core.checkpoints.held import LETTERS, Held


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Held]]:
    """All arrays of a pickle or an `.npz`, which its first bytes tell apart; they can be read until it is closed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of Haiku's parameters; there is none at {path}")
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        raise ValueError(f"{path} holds a single array; give an .npz of all, named scope/parameter")
    if start[:2] == b"PK":  # no pickle that is read begins like a zip file
        with npz.opened(path) as arrays:
            yield arrays
        return
    yield _by_name(path, restricted.read(path))


def _by_name(path: Path, found: Any) -> dict[str, Held]:
    """The arrays of a pickle: parameters by scope, and maybe statistics beside them."""
    found = _mapping(path, "it", found)
    flat: dict[str, Held] = {}
    for part in ("params", "state") if "params" in found else ("",):
        for scope, parameters in _mapping(path, part, found.get(part, {}) if part else found).items():
            for parameter, array in _mapping(path, scope, parameters).items():
                name = f"{scope}/{parameter}"
                if not isinstance(array, Held):
                    raise ValueError(f"{path} must hold arrays; {name} is of type {type(array).__name__}")
                if name in flat or len(name) > LETTERS:
                    raise ValueError(
                        f"{path} must hold {name[:LETTERS]} once, under a name of {LETTERS} letters at most"
                    )
                flat[name] = array
    return flat


def _mapping(path: Path, name: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path} must hold a dictionary of parameters by scope; {name} is of type {type(found).__name__}"
        )
    return found
