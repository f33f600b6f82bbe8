"""Reader of pickled Haiku parameters (nested dictionaries of NumPy or JAX arrays) that executes no code in the file.

A pickle is a program. This reader interprets only the instructions that are needed for data, and creates stand-ins
instead of arrays. Classes and functions that the file names are never imported. Their names are looked up in the table
`pickle_values.KNOWN`, and only functions in this table are called. NumPy receives only a numeric dtype, a shape, and
exactly the number of bytes that they imply. Any other instruction or name raises a ValueError. Instructions are decoded
with Python's `pickletools`, which does not execute them.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeAlias, cast

from perceiver_core.error_messages import errors_of
from perceiver_core.interop.weight_files.array_header import LONGEST_NAME, ArrayHeader
from perceiver_core.interop.weight_files.pickle_values import (
    KNOWN,
    ArrayStandIn,
    DTypeStandIn,
    Global,
    MappingStandIn,
    mapping,
)

LARGEST_STEPS = 100_000  # limit for both instructions and arrays; published files have at most 17 000 instructions


class _Reader:
    """Stack machine that interprets the pickle instructions in `INSTRUCTIONS`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.view = data, memoryview(data)
        self.stack: list[object] = []
        self.outer_stacks: list[list[object]] = []  # stacks saved by `mark`
        self.memo: dict[int, object] = {}

    def load(self) -> object:
        """Interpret the pickle and return its value, with stand-ins from `pickle_values` instead of arrays."""
        for step, (code, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], self.data))):
            if step >= LARGEST_STEPS:
                raise ValueError(f"it has more than {LARGEST_STEPS} instructions")
            if code.name == "STOP":
                break
            if code.name not in INSTRUCTIONS:
                external = code.name in ("PERSID", "BINPERSID", "NEXT_BUFFER")
                hint = "; the file refers to things outside itself, which are not read" * external
                raise ValueError(f"instruction {code.name} is none that data need{hint}")
            INSTRUCTIONS[code.name](self, argument)
        return self.stack.pop()

    def push(self, value: object) -> None:
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError("a whole number has more than 8 bytes")
        self.stack.append(value)

    def push_bytes(self, data: bytes | bytearray) -> None:
        """Push the bytes as a view of the memory-mapped file instead of a copy."""
        end = self.data.tell()
        self.stack.append(self.view[end - len(data) : end])

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        """Pop and return all values above the last mark."""
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def last(self, number: int) -> list[object]:
        """Pop and return the top `number` values of the stack, in the order in which they were pushed."""
        if number > len(self.stack):
            raise ValueError("it takes more values than there are")
        items = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return items

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name is no text")
        known = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # renamed in NumPy 2
        if known not in KNOWN:
            raise ValueError(
                f"the file refers to {module[:99]}.{name[:99]}, which may run code; only dictionaries and NumPy arrays "
                "are read. Open it where you trust it, and write its arrays with numpy.savez"
            )
        self.push(Global(known))

    def call(self, function: object, args: object) -> None:
        make = KNOWN[function.name] if isinstance(function, Global) else None
        if make is None or not isinstance(args, tuple):
            raise ValueError("it calls what is no function")
        self.push(make(*args))

    def new_mapping(self, function: object, args: object) -> None:
        if args != () or not isinstance(function, Global) or KNOWN[function.name] is not mapping:
            raise ValueError("it makes something else than a mapping")
        self.push(MappingStandIn())

    def build(self, state: object) -> None:
        target = self.stack[-1]
        if not isinstance(target, (DTypeStandIn, ArrayStandIn, MappingStandIn)):
            raise ValueError("it changes something else than an array, a dtype or a mapping")
        target.build(state)

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("it appends to what is no list")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it sets entries of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) or len(key) > LONGEST_NAME or key in target:
                raise ValueError(
                    f"a dictionary must have texts as its keys, each once, of at most {LONGEST_NAME} letters"
                )
            target[key] = value

    def push_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"it takes value {index}, which was not kept")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


# The type of the argument depends on the instruction, as `pickletools` documents.
Instruction: TypeAlias = Callable[..., None]
NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
INSTRUCTIONS: dict[str, Instruction] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, _: None),
    **dict.fromkeys(NUMBERS, _Reader.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Reader.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Reader.push_bytes),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "MARK": lambda reader, _: reader.mark(),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "LIST": lambda reader, _: reader.push(reader.since_mark()),
    "DICT": lambda reader, _: reader.push_dict(),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.last(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.last(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.last(3))),
    "APPEND": lambda reader, _: reader.append(reader.last(1)),
    "APPENDS": lambda reader, _: reader.append(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.set_items(reader.last(2)),
    "SETITEMS": lambda reader, _: reader.set_items(reader.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Reader.put),
    "MEMOIZE": lambda reader, _: reader.put(len(reader.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    "GLOBAL": lambda reader, names: reader.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda reader, _: reader.push_global(*reader.last(2)),
    "REDUCE": lambda reader, _: reader.call(*reader.last(2)),
    "NEWOBJ": lambda reader, _: reader.new_mapping(*reader.last(2)),
    "BUILD": lambda reader, _: reader.build(*reader.last(1)),
}


def read(path: Path) -> dict[str, ArrayHeader]:
    """Return a dictionary of the array headers in a pickle, keyed by `scope/parameter`.

    The arrays are the parameters and, if the file contains them, the running statistics of batch norms.

    Raises:
        ValueError: If the file is not a pickle of nested dictionaries of arrays.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with errors_of(f"{path} is not a pickle of dictionaries and arrays"):
        content = _Reader(data).load()
    with errors_of(f"{path} must hold a dictionary of parameters by scope"):
        content = _entries("it", content)
        parts = [(part, content.get(part, {})) for part in ("params", "state")]
        return _flattened(parts if "params" in content else [("it", content)], len(data))


def _flattened(parts: list[tuple[str, object]], size: int) -> dict[str, ArrayHeader]:
    """Flatten nested dictionaries of arrays to one dictionary of array headers, keyed by `scope/parameter`.

    Args:
        parts: Pairs of a name, for error messages, and a dictionary `scope -> parameter -> array`.
        size: Size of the file in bytes. The arrays must not have more bytes in total.
    """
    flat: dict[str, ArrayHeader] = {}
    num_bytes = 0
    for part, scopes in parts:
        for scope, parameters in _entries(part, scopes).items():
            for parameter, array in _entries(scope, parameters).items():
                name = f"{scope}/{parameter}"
                if not isinstance(array, ArrayStandIn) or array.header is None:
                    raise ValueError(f"{name} is not an array with data but of type {type(array).__name__}")
                if name in flat or len(name) > LONGEST_NAME or len(flat) > LARGEST_STEPS:
                    raise ValueError(
                        f"it must hold {name[:LONGEST_NAME]} once, under a name of {LONGEST_NAME} letters at most, and "
                        f"{LARGEST_STEPS} arrays at most"
                    )
                flat[name] = array.header
                num_bytes += array.header.num_bytes
                if num_bytes > size:
                    raise ValueError("its arrays take more than the file: one occurs several times")
    return flat


def _entries(name: str, value: object) -> dict[str, object]:
    content = value.content if isinstance(value, MappingStandIn) else value
    if not isinstance(content, dict):
        raise ValueError(f"{name} is of type {type(content).__name__}")
    return content
