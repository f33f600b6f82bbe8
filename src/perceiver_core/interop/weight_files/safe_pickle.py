"""Reader of pickled arrays that executes nothing: dictionaries, lists, numbers, text and NumPy's arrays.

A pickle is a program. This reader follows the instructions that data need, on values that can do nothing: a name in
the file refers to an entry of a table (`pickle_values`) and is never imported, only functions of that table are
called, and NumPy receives nothing but a numeric dtype, a shape and exactly the number of bytes that these two imply.
Reading ends at the first unknown instruction or name. Python's `pickletools` decodes the instructions; it only parses.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import IO, TypeAlias, cast

from perceiver_core.interop.weight_files.array_header import LONGEST_NAME, check_file_size
from perceiver_core.interop.weight_files.pickle_values import (
    KNOWN,
    ArrayStandIn,
    DTypeStandIn,
    Global,
    MappingStandIn,
    mapping,
)

LARGEST_STEPS = 100_000  # instructions, and values, of a file; the published ones take about 20 000
LARGEST_DEPTH = 16  # levels of nested dictionaries and lists


class _Reader:
    """Stack machine that executes the instructions of a pickle that data need.

    Args:
        data: The file.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.view, self.size = data, memoryview(data), len(data)
        self.stack: list[object] = []
        self.outer_stacks: list[list[object]] = []  # below the marks
        self.memo: dict[int, object] = {}
        self.encoded = self.num_values = self.num_bytes = 0

    def load(self) -> object:
        """Return the pickled value, with an `ArrayHeader` in place of each array."""
        for step, (code, argument, _) in zip(count(), pickletools.genops(cast(IO[bytes], self.data))):
            if step >= LARGEST_STEPS:
                raise ValueError(f"it has more than {LARGEST_STEPS} instructions")
            if code.name == "STOP":
                break
            if code.name not in INSTRUCTIONS:
                external = code.name in ("PERSID", "BINPERSID", "NEXT_BUFFER")
                hint = "; the file refers to things outside itself, which are not read" * external
                raise ValueError(f"instruction {code.name} is none that data need{hint}")
            INSTRUCTIONS[code.name](self, argument)
        return self.without_stand_ins(self.stack.pop())

    def without_stand_ins(self, value: object, depth: int = 0) -> object:
        """Return a value with its stand-ins replaced. A value that occurs several times is counted each time."""
        self.num_values += 1
        if depth > LARGEST_DEPTH or self.num_values > LARGEST_STEPS:
            raise ValueError(f"it holds more than {LARGEST_STEPS} values, or more than {LARGEST_DEPTH} in one another")
        if isinstance(value, MappingStandIn):
            value = value.content
        if isinstance(value, dict):
            return {key: self.without_stand_ins(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.without_stand_ins(item, depth + 1) for item in value])
        if isinstance(value, ArrayStandIn):
            if (header := value.header) is None:
                raise ValueError("an array has no data")
            self.num_bytes += header.num_bytes
            if self.num_bytes > self.size:
                raise ValueError("its arrays take more than the file: one occurs several times")
            return header
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError("it holds something else than dictionaries, lists, numbers, text and arrays")

    def push(self, value: object) -> None:
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError("a whole number has more than 8 bytes")
        self.stack.append(value)

    def push_bytes(self, data: bytes | bytearray) -> None:
        """Push a view of the bytes in the file, so that no copy of them is kept."""
        end = self.data.tell()
        self.stack.append(self.view[end - len(data) : end])

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        """Remove and return the values on the stack since the last mark."""
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def last(self, number: int) -> list[object]:
        """Remove and return the last values on the stack."""
        if number > len(self.stack):
            raise ValueError("it takes more values than there are")
        items = self.stack[len(self.stack) - number :]
        del self.stack[len(self.stack) - number :]
        return items

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name is no text")
        if (module, name) not in KNOWN:
            raise ValueError(
                f"the file refers to {module[:99]}.{name[:99]}, which may run code; only dictionaries and NumPy arrays "
                "are read. Open it where you trust it, and write its arrays with numpy.savez"
            )
        self.push(Global((module, name)))

    def call(self, function: object, args: object) -> None:
        make = KNOWN[function.name] if isinstance(function, Global) else None
        if make is None or not isinstance(args, tuple):
            raise ValueError("it calls what is no function")
        self.push(make(self, *args))

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


def read(path: Path) -> object:
    """Return the content of a pickle: dictionaries, lists, tuples, numbers and text, and `ArrayHeader` for each array.

    Raises:
        ValueError: The pickle holds anything else, or more than a file of its size can; or the file is no pickle.
    """
    check_file_size(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Reader(data).load()
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a pickle of dictionaries and arrays: {error}") from error
