"""Conversion of other libraries' numbers and containers to Python's built-in types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from operator import is_

import numpy as np
from numpy.typing import NDArray

_SCALARS = (int, float, str, bool, type(None))
_STRINGS = (str, bytes, bytearray, memoryview)
_LONGEST = 2**19  # items; a configuration, of at most 2**20 bytes, cannot hold more


def plain(value: object, *, mappings: bool = False) -> object:
    """Convert NumPy numbers and the containers of configuration libraries in a value to Python's built-in types.

    Converted are scalars of NumPy, its arrays of at most one axis, and sequences that are neither lists nor tuples if
    all they hold is numbers, strings, None and containers of these (those of OmegaConf, for example). Lists, tuples and
    dictionaries are searched. Anything else is returned as it is.

    Args:
        value: Any value.
        mappings: Whether to convert mappings that are no dictionaries, too. Constructors may read their items as
            attributes, which dictionaries do not have.

    Example:
        >>> import numpy as np
        >>> from perceiver_core.registry.plain import plain
        >>> plain((np.int64(3), {"rate": np.float64(0.5)})), plain(np.array([3, 5]))
        ((3, {'rate': 0.5}), [3, 5])
    """
    if type(value) in _SCALARS:
        return value
    if isinstance(value, np.generic | np.ndarray):
        return _of_numpy(value)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        items = [plain(item, mappings=mappings) for item in value]
        return value if all(map(is_, items, value)) else type(value)(items)
    if isinstance(value, dict) and type(value) is dict:
        found = {key: plain(item, mappings=mappings) for key, item in value.items()}
        return value if all(map(is_, found.values(), value.values())) else found
    if isinstance(value, (*_STRINGS, list, tuple, dict)):
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
    items: list[tuple[object, object]] = []
    try:
        for key in islice(value, _LONGEST + 1):  # not all at once: a sequence that computes its items may be slow
            item = plain(value[key] if isinstance(value, Mapping) else key, mappings=mappings)
            if len(items) == _LONGEST or not _is_plain(item):
                return value
            items.append((key, item))
    except Exception:  # a container whose items cannot be read, of a configuration that is not filled in
        return value
    return dict(items) if isinstance(value, Mapping) else [item for _, item in items]


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _SCALARS)
