"""What a pickle may name, as values that can do nothing; see `restricted`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from perceiver_core.checkpoints.held import Held, number, size_of

Name = tuple[str, str]
NDARRAY: Name = ("numpy", "ndarray")
RECONSTRUCT: set[Name] = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}


@runtime_checkable
class Counts(Protocol):
    """How large a file is, and how much of its text has become bytes."""

    size: int
    encoded: int


class Global:
    """A name: module and what is in it."""

    __slots__ = ("name",)

    def __init__(self, name: Name) -> None:
        self.name = name


class Type:
    """Stands for a dtype."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        number(code if isinstance(code, str) else type(code).__name__)
        self.code, self.order = code.lstrip("<>|="), code[0] if code[0] in "<>|=" else "="

    def build(self, state: Any) -> None:
        """Takes the byte order, and nothing else."""
        if not isinstance(state, tuple) or len(state) != 8 or state[0] != 3 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a dtype is not one of plain numbers")
        if state[2:] != (None, None, None, -1, -1, 0):
            raise ValueError("a dtype has fields, parts or flags; only plain numbers are read")
        self.order = state[1]


class Array:
    """Stands for an array, before and after it gets its data."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __init__(self) -> None:
        self.data: Any = None

    def fill(self, shape: Any, dtype: Any, data: Any, *, fortran: bool) -> Array:
        """Takes what NumPy needs to make it, if that is as much as the shape says."""
        if self.data is not None:
            raise ValueError("an array gets its data twice")
        if not isinstance(dtype, Type) or not isinstance(data, (bytes, memoryview)):
            raise ValueError("an array is not one of plain numbers")
        self.dtype = number(dtype.order + dtype.code)
        if (size := size_of(shape, self.dtype)) != len(data):
            raise ValueError(f"an array of shape {shape} and dtype {self.dtype} takes {size} bytes; it has {len(data)}")
        self.shape, self.fortran, self.data = shape, fortran, data
        return self

    def build(self, state: Any) -> None:
        """Takes what NumPy's own `__setstate__` would."""
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
            raise ValueError("an array is not as NumPy pickles one")
        self.fill(state[1], state[2], state[4], fortran=bool(state[3]))

    def held(self) -> Held:
        """What it is, and what makes it."""
        if self.data is None:
            raise ValueError("an array has no data")
        return Held(self.shape, self.dtype, partial(_made, self.data, self.dtype, self.shape, self.fortran))


def _made(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> NDArray[Any]:
    flat = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=True)
    return flat.reshape(shape, order="F" if fortran else "C")


class Mapping:
    """Stands for Haiku's mapping where it is made before it gets what it maps."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        """Takes what it maps."""
        state = state[0] if isinstance(state, tuple) and state else state
        found = state.get("_mapping", state) if isinstance(state, dict) else None
        if self.held is not None or not isinstance(found, dict):
            raise ValueError("a mapping is not as Haiku pickles one")
        self.held = found


def mapping(reader: Counts, *args: Any) -> Any:
    """A dictionary: the very one that is given, since copies of copies would grow without end."""
    if len(args) > 1 or not all(isinstance(given, (dict, Mapping)) for given in args):
        raise ValueError("a mapping is made of something else than a dictionary")
    return args[0] if args else {}


def _encode(reader: Counts, text: Any, coding: Any) -> bytes:
    """How old pickles write bytes."""
    if not isinstance(text, str) or coding != "latin1":
        raise ValueError("something is encoded that is no text")
    reader.encoded += len(text)
    if reader.encoded > reader.size:
        raise ValueError("the same text is encoded again and again")
    return text.encode("latin1")


def _reconstruct(reader: Counts, kind: Any, shape: Any, code: Any) -> Array:
    if not isinstance(kind, Global) or kind.name != NDARRAY:
        raise ValueError("an array is of another class than NumPy's")
    return Array()


def _of_buffer(reader: Counts, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array().fill(shape, dtype, data, fortran=order == "F")


def _scalar(reader: Counts, dtype: Any, data: Any) -> Array:
    return Array().fill((), dtype, data, fortran=False)


def _of_jax(reader: Counts, make: Any, args: Any, state: Any, aval: Any) -> Array:
    if not isinstance(make, Global) or make.name not in RECONSTRUCT or not isinstance(args, tuple):
        raise ValueError("an array is not as JAX pickles one")
    array = _reconstruct(reader, *args)
    array.build(state)
    return array


# What a file may name, and what is called where it calls that. None: it is given to others, and never called.
KNOWN: dict[Name, Callable[..., Any] | None] = {
    ("collections", "OrderedDict"): mapping,
    ("haiku._src.data_structures", "FlatMapping"): mapping,
    ("haiku._src.data_structures", "frozendict"): mapping,
    ("_codecs", "encode"): _encode,
    **{(module, "bytes"): lambda reader: b"" for module in ("builtins", "__builtin__")},
    NDARRAY: None,
    ("numpy", "dtype"): lambda reader, code, align, copy: Type(code),
    **dict.fromkeys(RECONSTRUCT, _reconstruct),
    **{(f"numpy.{core}.numeric", "_frombuffer"): _of_buffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("jax._src.array", "_reconstruct_array"): _of_jax,
    ("jax._src.device_array", "reconstruct_device_array"): _of_jax,
}
