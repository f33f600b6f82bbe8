"""Pickles of arrays, read without executing anything: dictionaries, lists, numbers, text and NumPy's arrays.

A pickle is a program. This runs those of its instructions that data need, on values that can do nothing: a name that a
file gives stands for an entry of a table (`stand_ins`) and is never looked up, what is called is one of that table's
functions, and NumPy sees nothing but a dtype of numbers, a shape and as many bytes as these two take. An instruction or
name that is not known ends the reading.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perceiver_core.checkpoints.held import LETTERS, check_file
from perceiver_core.checkpoints.stand_ins import KNOWN, Array, Global, Mapping, Type, mapping

STEPS = 100_000  # of a file; the published ones take about 20 000
DEPTH = 16  # of dictionaries and lists in one another


class _Reader:
    """Runs a pickle.

    Args:
        data: all of it.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.view, self.size, self.at = data, memoryview(data), len(data), 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.encoded = self.seen = self.total = 0

    def load(self) -> Any:
        """What it makes, with `Held` for each array."""
        for _ in range(STEPS):
            code = self.part(1)[0]
            if code == ord("."):
                return self.plain(self.stack.pop())
            if code not in INSTRUCTIONS:
                outside = "; the file refers to things outside itself, which are not read" * (code in b"PQ\x97")
                raise ValueError(f"instruction {code:#x} is none that data need{outside}")
            INSTRUCTIONS[code](self)
        raise ValueError(f"it has more than {STEPS} instructions")

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A value without stand-ins. What stands in several places counts as often."""
        self.seen += 1
        if depth > DEPTH or self.seen > STEPS:
            raise ValueError(f"it holds more than {STEPS} values, or more than {DEPTH} in one another")
        if isinstance(value, Mapping):
            value = value.held
        if type(value) is dict:
            return {key: self.plain(held, depth + 1) for key, held in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.plain(held, depth + 1) for held in value])
        if isinstance(value, Array):
            held = value.held()
            self.total += len(value.data)
            if self.total > self.size:
                raise ValueError("its arrays take more than the file: one stands in several places")
            return held
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError("it holds something else than dictionaries, lists, numbers, text and arrays")

    def part(self, count: int) -> memoryview:
        if count > self.size - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.view[self.at - count : self.at]

    def line(self, most: int | None = None) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0 or (most is not None and end - self.at > most):
            raise ValueError("a line does not end")
        return bytes(self.part(end + 1 - self.at)[:-1])

    def unpacked(self, form: str) -> Any:
        return struct.unpack(form, self.part(struct.calcsize(form)))[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise ValueError("it takes more values than there are")
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def integer(self) -> None:
        text = self.line(21).rstrip(b"L")
        self.push({b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text))

    def long(self, form: str) -> None:
        if not 0 <= (count := self.unpacked(form)) <= 8:
            raise ValueError("a whole number has more than 8 bytes")
        self.push(int.from_bytes(self.part(count), "little", signed=True))

    def text(self, form: str) -> None:
        self.push(str(self.part(self.unpacked(form)), "utf-8", "surrogatepass"))

    def named(self, module: Any, name: Any) -> None:
        if (module, name) not in KNOWN:
            raise ValueError(
                f"the file asks for {str(module)[:99]}.{str(name)[:99]}, which may run code; only dictionaries and "
                "NumPy arrays are read. Open it where you trust it, and write its arrays with numpy.savez"
            )
        self.push(Global((module, name)))

    def named_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name is no text")
        self.named(module, name)

    def call(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        make = KNOWN[name.name] if isinstance(name, Global) else None
        if make is None or not isinstance(args, tuple):
            raise ValueError("it calls what is no function")
        self.push(make(self, *args))

    def new(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if args != () or not isinstance(name, Global) or KNOWN[name.name] is not mapping:
            raise ValueError("it makes something else than a mapping")
        self.push(Mapping())

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, (Type, Array, Mapping)):
            raise ValueError("it changes something else than an array, a dtype or a mapping")
        made.build(state)

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if type(into) is not dict or len(items) % 2:
            raise ValueError("it sets entries of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or len(key) > LETTERS or key in into:
                raise ValueError(f"a dictionary must have texts as its keys, each once, of at most {LETTERS} letters")
            into[key] = value

    def dictionary(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set(items)

    def last(self, count: int) -> list[Any]:
        self.tuple_of(count)
        return list(self.stack.pop())

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"it takes value {index}, which was not kept")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


Step = Callable[[_Reader], None]
BYTE, SHORT, WORD, LONG = "<B", "<H", "<I", "<Q"
INSTRUCTIONS: dict[int, Step] = {
    ord(code): step
    for code, step in {
        "\x80": lambda r: r.unpacked(BYTE) and None,  # of which protocol; the instructions tell
        "\x95": lambda r: r.unpacked(LONG) and None,  # a frame
        "(": _Reader.mark,
        "N": lambda r: r.push(None),
        "\x88": lambda r: r.push(True),
        "\x89": lambda r: r.push(False),
        "I": _Reader.integer,
        "L": _Reader.integer,
        "K": lambda r: r.push(r.unpacked(BYTE)),
        "M": lambda r: r.push(r.unpacked(SHORT)),
        "J": lambda r: r.push(r.unpacked("<i")),
        "\x8a": lambda r: r.long(BYTE),
        "\x8b": lambda r: r.long("<i"),
        "F": lambda r: r.push(float(r.line(40))),
        "G": lambda r: r.push(r.unpacked(">d")),
        "V": lambda r: r.push(str(r.line(), "raw-unicode-escape")),
        "X": lambda r: r.text(WORD),
        "\x8c": lambda r: r.text(BYTE),
        "\x8d": lambda r: r.text(LONG),
        "B": lambda r: r.push(r.part(r.unpacked(WORD))),
        "C": lambda r: r.push(r.part(r.unpacked(BYTE))),
        "\x8e": lambda r: r.push(r.part(r.unpacked(LONG))),
        "\x96": lambda r: r.push(r.part(r.unpacked(LONG))),
        "]": lambda r: r.push([]),
        "}": lambda r: r.push({}),
        ")": lambda r: r.push(()),
        "l": lambda r: r.push(r.since_mark()),
        "d": _Reader.dictionary,
        "t": lambda r: r.push(tuple(r.since_mark())),
        "\x85": lambda r: r.tuple_of(1),
        "\x86": lambda r: r.tuple_of(2),
        "\x87": lambda r: r.tuple_of(3),
        "a": lambda r: r.append(r.last(1)),
        "e": lambda r: r.append(r.since_mark()),
        "s": lambda r: r.set(r.last(2)),
        "u": lambda r: r.set(r.since_mark()),
        "p": lambda r: r.put(int(r.line(20))),
        "q": lambda r: r.put(r.unpacked(BYTE)),
        "r": lambda r: r.put(r.unpacked(WORD)),
        "\x94": lambda r: r.put(len(r.memo)),
        "g": lambda r: r.get(int(r.line(20))),
        "h": lambda r: r.get(r.unpacked(BYTE)),
        "j": lambda r: r.get(r.unpacked(WORD)),
        "c": lambda r: r.named(str(r.line(200), "utf-8"), str(r.line(200), "utf-8")),
        "\x93": _Reader.named_on_stack,
        "R": _Reader.call,
        "\x81": _Reader.new,
        "b": _Reader.build,
    }.items()
}


def read(path: Path) -> Any:
    """What a pickle holds: dictionaries, lists, tuples, numbers and text, and `Held` for each array.

    Raises:
        ValueError: it asks for anything but these, holds more than a file of its size can, or is no pickle.
    """
    check_file(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Reader(data).load()
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is not a pickle of dictionaries and arrays: {error}") from error
