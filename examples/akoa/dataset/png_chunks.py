"""Reading and verification of the chunks of PNG files, before their pixels are decoded.

Pillow does not verify the checksums of pixel data, and leaves rows black if the compressed data end early. This module
verifies both, and checks the size of an image before memory for its pixels is allocated.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.akoa.dataset.orientation import check_texts
from examples.common.regular_files import read_regular_file

MAX_PIXELS = 30_000_000
"""Largest number of pixels of an image."""
MAX_BYTES = 128_000_000
"""Largest size of a file."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_FORMATS = {  # bit depths and number of channels of each color type
    GRAY: ((1, 2, 4, 8, 16), 1),
    RGB: ((8, 16), 3),
    PALETTE: ((1, 2, 4, 8), 1),
    GRAY_ALPHA: ((8, 16), 2),
    RGB_ALPHA: ((8, 16), 4),
}
# First column and row, and steps between columns and rows, of the seven passes of an interlaced image.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_ORDER = re.compile(b"IHDR(PLTE)?(tRNS)?(IDAT)+IEND")
_MAX_CHUNKS = 50_000
_BLOCK = 2**16  # bytes of compressed data that are verified at a time
_COPY = "copy it again from its source"


class Chunk(NamedTuple):
    """Part of a PNG file: its name, its content, and all its bytes, including length, name and checksum."""

    name: bytes
    data: memoryview
    whole: memoryview


class Header(NamedTuple):
    """Content of the chunk IHDR."""

    width: int
    height: int
    depth: int
    color_type: int
    compression: int
    filter: int
    interlace: int

    @property
    def channels(self) -> int:
        """Number of samples of a pixel."""
        return _FORMATS[self.color_type][1]


def read_chunks(path: Path) -> tuple[Header, list[Chunk]]:
    """Read the chunks of an image that are needed to show it: IHDR, PLTE, tRNS, IDAT, eXIf and IEND.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is not a PNG file, is damaged, is an animation, or exceeds `MAX_PIXELS` or `MAX_BYTES`. The
            message does not name the file.
    """
    chunks = list(_split(memoryview(read_regular_file(path, MAX_BYTES))))
    if any(chunk.name in (b"acTL", b"fdAT") for chunk in chunks):
        raise ValueError("it is an animation; save the frame that is meant as a file of its own")
    check_texts([(chunk.name, chunk.data) for chunk in chunks])
    # A lower-case first letter marks chunks that may be ignored.
    chunks = [chunk for chunk in chunks if chunk.name in (b"tRNS", b"eXIf") or not chunk.name[0] & 0x20]
    header = _checked_header(chunks)
    _check_pixel_data(chunks, header)
    return header, chunks


def find(chunks: Sequence[Chunk], name: bytes) -> bytes:
    """Return the content of the chunk with this name, or no bytes if there is none."""
    return next((bytes(chunk.data) for chunk in chunks if chunk.name == name), b"")


def _split(content: memoryview) -> Iterator[Chunk]:
    """Split a file into its chunks, up to the end of the image, and verify their checksums."""
    if content[: len(SIGNATURE)] != SIGNATURE:
        raise ValueError("it is not a PNG file; convert it to PNG if it is an image of another format")
    start = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if start + 12 > len(content):
            break
        length, name = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if end > len(content):
            break
        data = content[start + 8 : end - 4]
        if zlib.crc32(content[start + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError(f"it is damaged: the checksum of its chunk {name!r} is wrong; {_COPY}")
        if start == len(SIGNATURE):
            _check_size(name, data)
        yield Chunk(name, data, content[start:end])
        if name == b"IEND":
            return
        start = end
    else:
        raise ValueError(f"it has more than {_MAX_CHUNKS:,} chunks, the limit; save it again with an image editor")
    raise ValueError(f"it is truncated: its last chunk (IEND) is missing; {_COPY}")


def _check_size(name: bytes, header: memoryview) -> None:
    if name != b"IHDR" or len(header) != struct.calcsize(">2I5B"):
        raise ValueError(f"it is damaged: its header is missing or has a wrong length; {_COPY}")
    width, height = struct.unpack_from(">2I", header)
    if width * height == 0:
        raise ValueError(f"it has {width} x {height} pixels, need at least one; {_COPY}")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}, the limit; reduce the size of the image"
        )


def _checked_header(chunks: Sequence[Chunk]) -> Header:
    """Return the header of an image whose format is known and whose chunks are in order."""
    names = [chunk.name for chunk in chunks if chunk.name != b"eXIf"]
    if not _ORDER.fullmatch(b"".join(names)) or len(chunks) - len(names) > 1:
        raise ValueError(f"it is damaged: its chunks are incomplete or out of order; {_COPY}")
    header = Header(*struct.unpack(">2I5B", chunks[0].data))
    depths, _ = _FORMATS.get(header.color_type, ((), 0))
    if header.depth not in depths or header.compression or header.filter or header.interlace > 1:
        raise ValueError(
            f"its header is invalid or of an unknown format ({header}); save it again with an image editor"
        )
    palette, transparency = find(chunks, b"PLTE"), find(chunks, b"tRNS")
    if header.color_type in (GRAY, RGB) and len(transparency) not in (0, 2 * header.channels):
        raise ValueError(f"it is damaged: its transparent color is invalid; {_COPY}")
    complete = 3 <= len(palette) <= 3 * 256 and not len(palette) % 3
    if header.color_type == PALETTE and (not complete or 3 * len(transparency) > len(palette)):
        raise ValueError(f"it is damaged: its palette is missing or invalid; {_COPY}")
    return header


def _check_pixel_data(chunks: Sequence[Chunk], header: Header) -> None:
    """Decompress the pixel data once, without keeping them, to check that they are complete."""
    expected, actual = _num_bytes(header), 0
    unpacker = zlib.decompressobj()
    parts = (chunk.data for chunk in chunks if chunk.name == b"IDAT")
    try:
        for block in (part[i : i + _BLOCK] for part in parts for i in range(0, len(part), _BLOCK)):
            pending: memoryview | bytes = block
            while pending and actual <= expected:
                actual += len(unpacker.decompress(pending, 16 * _BLOCK))
                pending = unpacker.unconsumed_tail
        while actual <= expected and (rest := unpacker.decompress(b"", _BLOCK)):
            actual += len(rest)
    except zlib.error as error:
        raise ValueError(f"its pixel data are damaged ({error}); {_COPY}") from error
    if actual != expected or not unpacker.eof:
        raise ValueError(
            f"its pixel data are damaged: they are not the {expected:,} bytes of {header.width} x {header.height} "
            f"pixels; {_COPY}"
        )


def _num_bytes(header: Header) -> int:
    """Number of bytes of the decompressed pixel data: rows, each after a byte that specifies its filter."""
    bits = header.depth * header.channels
    passes = _PASSES if header.interlace else ((0, 0, 1, 1),)
    sizes = [(len(range(x, header.width, dx)), len(range(y, header.height, dy))) for x, y, dx, dy in passes]
    return sum(height * (1 + (width * bits + 7) // 8) for width, height in sizes if width)
