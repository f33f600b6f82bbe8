"""Pickles of arrays, read without executing anything: dictionaries, lists, numbers, strings and NumPy's arrays.

A pickle names the functions that make it. Here a few names are known, all of NumPy or of mappings; any other is refused
before it is looked up, so nothing is imported and nothing called that a file chose.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FlatMapping(dict[str, Any]):
    """Stands for Haiku's mapping of the same name, in all the ways in which it was pickled."""

    def __setstate__(self, state: Any) -> None:
        mapping = state.get("_mapping", state) if isinstance(state, Mapping) else state[0]
        self.update(mapping)


def _array(*_: Any) -> NDArray[Any]:
    """An empty array, which the pickle then fills."""
    return np.ndarray((0,), dtype=np.uint8)


def _of_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how old pickles write bytes
    ("haiku._src.data_structures", "FlatMapping"): FlatMapping,
    ("haiku._src.data_structures", "frozendict"): FlatMapping,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.numeric", "_frombuffer"): _of_buffer for core in ("core", "_core")},
    **{
        (f"numpy.{core}.multiarray", name): made
        for core in ("core", "_core")
        for name, made in (("_reconstruct", _array), ("scalar", lambda dtype, data: np.frombuffer(data, dtype)[0]))
    },
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ValueError(
                f"the file asks for {module}.{name}, which may run code; only dictionaries and NumPy arrays are read. "
                "Open it where you trust it, and write its arrays with numpy.savez"
            )
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("the file refers to things outside itself, which are not read")


def read(path: Path) -> Any:
    """What a pickle holds.

    Raises:
        ValueError: it asks for anything but dictionaries and arrays, or is no pickle.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a pickle of dictionaries and arrays: {error}") from error
