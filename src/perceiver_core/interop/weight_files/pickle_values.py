"""Stand-ins for the objects in a pickle, and the table of class and function names that it may contain (`KNOWN`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from perceiver_core.interop.weight_files.array_header import Array, ArrayHeader, DType, checked_shape, number_dtype

NDARRAY, RECONSTRUCT = "numpy.ndarray", "numpy.core.multiarray._reconstruct"


class Global:
    """Stand-in for a class or function that a pickle names. The class or function is never imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class DTypeStandIn:
    """Stand-in for a pickled NumPy dtype."""

    __slots__ = ("dtype",)

    def __init__(self, code: object) -> None:
        self.dtype = number_dtype(code if isinstance(code, str) else type(code).__name__)

    def build(self, state: object) -> None:
        """Set the byte order from the state that a pickle passes to NumPy's `dtype.__setstate__`."""
        if not isinstance(state, tuple) or len(state) != 8 or state[0] != 3 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a dtype is not one of plain numbers")
        if state[2:] != (None, None, None, -1, -1, 0):
            raise ValueError("a dtype has fields, parts or flags; only plain numbers are read")
        self.dtype = self.dtype.newbyteorder(state[1])


class ArrayStandIn:
    """Stand-in for a pickled NumPy array. `header` is None until `fill` or `build` sets it."""

    __slots__ = ("header",)

    def __init__(self) -> None:
        self.header: ArrayHeader | None = None

    def fill(self, shape: object, dtype: object, data: object, *, fortran: bool) -> ArrayStandIn:
        """Set the header from pickled values, and return the stand-in itself.

        Args:
            shape: Shape of the array.
            dtype: `DTypeStandIn` of the array.
            data: View of the bytes in the file, or a string with one character per byte.
            fortran: Whether the data are in column-major order.
        """
        if self.header is not None:
            raise ValueError("an array gets its data twice")
        if not isinstance(dtype, DTypeStandIn) or not isinstance(data, (str, memoryview)):
            raise ValueError("an array is not one of plain numbers")
        sizes, numbers = checked_shape(shape), dtype.dtype
        header = ArrayHeader(sizes, numbers, partial(_numpy_array, data, numbers, sizes, fortran))
        if header.num_bytes != len(data):
            raise ValueError(
                f"an array of shape {shape} and dtype {numbers} takes {header.num_bytes} bytes; it has {len(data)}"
            )
        self.header = header
        return self

    def build(self, state: object) -> None:
        """Set the header from the state that a pickle passes to NumPy's `ndarray.__setstate__`."""
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
            raise ValueError("an array is not as NumPy pickles one")
        self.fill(state[1], state[2], state[4], fortran=bool(state[3]))


def _numpy_array(data: str | memoryview, dtype: DType, shape: tuple[int, ...], fortran: bool) -> Array:
    encoded = data.encode("latin1") if isinstance(data, str) else data
    flat = np.frombuffer(encoded, dtype).astype(dtype.newbyteorder("="), copy=True)
    return flat.reshape(shape, order="F" if fortran else "C")


class MappingStandIn:
    """Stand-in for a pickled Haiku mapping. `content` is None until `build` sets it."""

    __slots__ = ("content",)

    def __init__(self) -> None:
        self.content: dict[str, object] | None = None

    def build(self, state: object) -> None:
        """Set the content from the pickled state, a dictionary or a tuple that starts with one.

        If the dictionary has the key `_mapping`, the value of this key is the content.
        """
        state = state[0] if isinstance(state, tuple) and state else state
        content = state.get("_mapping", state) if isinstance(state, dict) else None
        if self.content is not None or not isinstance(content, dict):
            raise ValueError("a mapping is not as Haiku pickles one")
        self.content = content


def mapping(*args: object) -> object:
    """Stand-in for the constructors of dictionary types. Return the argument, or a new dictionary if there is none.

    The argument is not copied, because a malicious file could request copies until memory is full.
    """
    if len(args) > 1 or not all(isinstance(given, (dict, MappingStandIn)) for given in args):
        raise ValueError("a mapping is made of something else than a dictionary")
    return args[0] if args else {}


def _encode(text: object, encoding: object) -> str:
    """Stand-in for `_codecs.encode`, which converts text to bytes in old pickle protocols. Return the text unchanged.

    The text is converted to bytes only when the array is read.
    """
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("something is encoded that is no text")
    return text


def _reconstruct(array_class: object, shape: object, code: object) -> ArrayStandIn:
    if not isinstance(array_class, Global) or array_class.name != NDARRAY:
        raise ValueError("an array is of another class than NumPy's")
    return ArrayStandIn()


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> ArrayStandIn:
    return ArrayStandIn().fill(shape, dtype, data, fortran=order == "F")


def _jax_array(function: object, args: object, state: object, aval: object) -> ArrayStandIn:
    if not isinstance(function, Global) or function.name != RECONSTRUCT or not isinstance(args, tuple):
        raise ValueError("an array is not as JAX pickles one")
    array = _reconstruct(*args)
    array.build(state)
    return array


# Names that a pickle may contain, and the function to call for each. None for names that are only passed as arguments.
KNOWN: dict[str, Callable[..., object] | None] = {
    "collections.OrderedDict": mapping,
    "haiku._src.data_structures.FlatMapping": mapping,
    "haiku._src.data_structures.frozendict": mapping,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda: "",
    "__builtin__.bytes": lambda: "",
    NDARRAY: None,
    "numpy.dtype": lambda code, align, copy: DTypeStandIn(code),
    RECONSTRUCT: _reconstruct,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.core.multiarray.scalar": lambda dtype, data: _from_buffer(data, dtype, (), "C"),
    "jax._src.array._reconstruct_array": _jax_array,
    "jax._src.device_array.reconstruct_device_array": _jax_array,
}
