"""Damage to files: changed bytes, zip archives and JSON texts, and replaced files."""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENDS = 2048  # bytes at the start and the end of a file, where the headers are
PLAUSIBLE = (0, 1, 2, 7, 8, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)


def flipped(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with one to eight bits flipped."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if data else 0):
        changed[_position(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the start of the data."""
    return data[: rng.choice((0, 1, len(data) - 1, _position(data, rng), rng.randrange(len(data) + 1)))]


def extended(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with bytes prepended or appended."""
    more = rng.choice((b"\0", b"\0" * rng.randrange(1, 5000), rng.randbytes(rng.randrange(1, 300)), other, data))
    return more + data if rng.random() < 0.3 else data + more


def spliced(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the start of the data and the end of those of another file."""
    return data[: _position(data, rng)] + other[_position(data, rng) if rng.random() < 0.3 else _position(other, rng) :]


def mixed(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with a block of another file at the same position."""
    start, end = _block(data, rng)
    return data[:start] + other[start:end].ljust(end - start, b"\0") + data[end:]


def zeroed(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with a block of zeros, as after a crash."""
    start, end = _block(data, rng)
    return data[:start] + b"\0" * (end - start) + data[end:]


def duplicated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with a block that occurs twice."""
    start, end = _block(data, rng)
    return data[:end] + data[start:]


def removed(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data without a block."""
    start, end = _block(data, rng)
    return data[:start] + data[end:]


def swapped(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with two blocks of equal length exchanged."""
    size = min(rng.choice((1, 4, 64, 512)), max(1, len(data) // 4))
    if len(data) < 2 * size:
        return data[::-1]
    one = rng.randrange(len(data) - 2 * size + 1)
    two = rng.randrange(one + size, len(data) - size + 1)
    blocks = data[one : one + size], data[two : two + size]
    return data[:one] + blocks[1] + data[one + size : two] + blocks[0] + data[two + size :]


def overwritten(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with an integer that is plausible in a header, such as a size."""
    code = rng.choice(("<H", "<I", "<Q", ">I"))
    size = struct.calcsize(code)
    value = rng.choice((*PLAUSIBLE, len(data), len(data) - 1, rng.randrange(2**16)))
    at = _position(data, rng)
    return data[:at] + struct.pack(code, value % 256**size) + data[at + size :]


def renumbered(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the data with another number in the text of a header."""
    if not (numbers := list(re.finditer(rb"\d+", data[:ENDS]))):
        return flipped(data, other, rng)
    number = rng.choice(numbers)
    new = str(rng.choice((*PLAUSIBLE, int(number[0][:18]) + 1, rng.randrange(100)))).encode()
    if rng.random() < 0.5:
        new = new[: len(number[0])].rjust(len(number[0]), b"0")
    return data[: number.start()] + new + data[number.end() :]


def with_json_header(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with a changed header of valid length. The data may be those of another file."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = changed_json(data[8 : 8 + size], other, rng)
    except ValueError:
        return flipped(data, other, rng)
    body = other[8 + int.from_bytes(other[:8], "little") :] if rng.random() < 0.1 else data[8 + size :]
    return len(header).to_bytes(8, "little") + header + body


def changed_json(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a JSON text with one to three values, keys or syntax elements changed."""
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(tree)) or [(tree, None)])
        if key is None:
            return json.dumps(_value(rng)).encode()
        action = rng.choice(("value", "value", "remove", "rename", "copy", "add"))
        if action == "value":
            holder[key] = _value(rng, holder[key])
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[rng.choice((f"{key}x", str(key)[:-1], "model", "\x1b[2J", "a" * 3000))] = holder.pop(key)
        elif action == "copy":
            other_holder, other_key = rng.choice(list(_places(tree)))
            holder[key] = json.loads(json.dumps(other_holder[other_key]))
        elif isinstance(holder, dict):
            holder[rng.choice(("extra", "", "\x1b[31mok", key.swapcase()))] = _value(rng)
        else:
            holder.insert(0, _value(rng))
    text = json.dumps(tree, indent=rng.choice((None, 2)))
    if rng.random() < 0.1 and text.startswith("{") and tree:  # a key twice
        text = '{"' + rng.choice(list(tree)).replace("\x1b", "") + '": ' + json.dumps(_value(rng)) + ", " + text[1:]
    if rng.random() < 0.05:  # deep nesting
        text = '{"a":' * 50_000 + text + "}" * 50_000
    return text.encode()


def rezipped(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return an archive with the same entries, written in an unusual way or with entries missing or added."""
    way = rng.choice(
        ("prefix", "comment", "joined", "stored", "deflated", "twice", "case", "missing", "added", "stream")
    )
    if way in ("prefix", "joined"):
        return (other if way == "joined" else rng.randbytes(rng.randrange(1, 200))) + data
    target = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if way == "deflated" else zipfile.ZIP_STORED
    try:
        entries = [(info, zipfile.ZipFile(io.BytesIO(data)).read(info)) for info in _archive(data).infolist()]
        others = [(info.filename, _archive(other).read(info)) for info in _archive(other).infolist()]
    except Exception:  # not an archive, or already damaged
        return flipped(data, other, rng)
    if way == "missing":
        del entries[rng.randrange(len(entries))]
    stream = io.BufferedWriter(Unseekable(target)) if way == "stream" else target
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of entries that occur twice
        for info, content in entries:
            archive.writestr(info.filename, content)
        if way in ("twice", "case", "added"):
            name, content = rng.choice(others)
            archive.writestr({"twice": name, "case": name.swapcase(), "added": f"{name}x"}[way], content)
        archive.comment = b"PK\5\6" * 5 if way == "comment" else b""
    stream.flush()
    return target.getvalue()


Change = Callable[[bytes, bytes, random.Random], bytes]
BYTES: tuple[Change, ...] = (
    *(flipped, flipped, truncated, extended, spliced, mixed, zeroed, duplicated, removed, swapped, overwritten),
    *(overwritten, renumbered),
)
# Changes of the content of a file, keyed by the end of its name.
CHANGES: dict[str, tuple[Change, ...]] = {
    ".json": (*BYTES, *([changed_json] * 12)),
    ".safetensors": (*BYTES, *([with_json_header] * 6)),
    ".bin": (*BYTES, *([rezipped] * 4)),
    ".ckpt": (*BYTES, *([rezipped] * 4)),
    ".npz": (*BYTES, *([rezipped] * 4)),
}


def replaced(path: Path, rng: random.Random) -> str:
    """Remove a file, or replace it by a folder, pipe, link or device. Return which of these was done."""
    kind = rng.choice(("nothing", "folder", "pipe", "link to itself", "broken link", "device"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"link to itself": path, "broken link": "nowhere", "device": "/dev/zero"}[kind])
    return kind


class Unseekable(io.RawIOBase):
    """Stream without seek, such as a pipe. zipfile writes sizes and checksums after the data to it."""

    def __init__(self, target: io.BytesIO) -> None:
        self.target = target

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return self.target.write(data)


def _archive(data: bytes) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(data))


def _position(data: bytes, rng: random.Random) -> int:
    """Return a random index, often near the start or the end."""
    last = max(0, len(data) - 1)
    near = min(last, rng.randrange(ENDS))
    return rng.choice((near, last - near, rng.randint(0, last)))


def _block(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = _position(data, rng)
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 512, 4096)))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return all containers in a JSON value with each of their keys."""
    found: list[tuple[Any, Any]] = []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found += [(tree, key), *_places(tree[key])]
    return found


def _value(rng: random.Random, old: Any = None) -> Any:
    numbers = (*PLAUSIBLE, -1, -(2**63), 10**400, 0.5, 1e308, float("nan"), float("inf"))
    near = (old + rng.choice((-1, 1, 1000)), -old, float(old)) if type(old) is int and abs(old) < 2**60 else (old,)
    others = (None, True, False, "", "x", "F16", "F64", "I8", "torch.float64", [], {}, [[]], [1, 2], {"a": 1}, str(old))
    return rng.choice((rng.choice(numbers), rng.choice(others), rng.choice(near)))
