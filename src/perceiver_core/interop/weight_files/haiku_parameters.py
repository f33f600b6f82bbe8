"""Files of Haiku's parameters, pickle or `.npz`: headers of all arrays by `scope/parameter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from perceiver_core.interop.weight_files import npz, safe_pickle
from perceiver_core.interop.weight_files.array_header import LONGEST_NAME, ArrayHeader


@contextmanager
def open_parameters(path: Path) -> Iterator[dict[str, ArrayHeader]]:
    """Yield the headers of a file, after detecting its format; arrays can be read until the context ends.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of Haiku's parameters; there is none at {path}")
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        raise ValueError(f"{path} holds a single array; give an .npz of all, named scope/parameter")
    if start[:2] == b"PK":  # no pickle that is read begins like a zip file
        with npz.open_npz(path) as arrays:
            yield arrays
    else:
        yield _flattened(path, safe_pickle.read(path))


def _flattened(path: Path, content: object) -> dict[str, ArrayHeader]:
    """Return the arrays of a pickle by name: parameters by scope, and running statistics if it has them."""
    content = _mapping(path, "it", content)
    flat: dict[str, ArrayHeader] = {}
    for part in ("params", "state") if "params" in content else ("",):
        for scope, parameters in _mapping(path, part, content.get(part, {}) if part else content).items():
            for parameter, array in _mapping(path, scope, parameters).items():
                name = f"{scope}/{parameter}"
                if not isinstance(array, ArrayHeader):
                    raise ValueError(f"{path} must hold arrays; {name} is of type {type(array).__name__}")
                if name in flat or len(name) > LONGEST_NAME:
                    raise ValueError(
                        f"{path} must hold {name[:LONGEST_NAME]} once, under a name of {LONGEST_NAME} letters at most"
                    )
                flat[name] = array
    return flat


def _mapping(path: Path, name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{path} must hold a dictionary of parameters by scope; {name} is of type {type(value).__name__}"
        )
    return value
