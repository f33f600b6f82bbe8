"""PNG files of all formats, also of those that Pillow cannot write, and files that are put together from chunks."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# All bit depths and numbers of channels of each color type.
FORMATS = {0: ((1, 2, 4, 8, 16), 1), 2: ((8, 16), 3), 3: ((1, 2, 4, 8), 1), 4: ((8, 16), 2), 6: ((8, 16), 4)}
CASES = [(color_type, depth) for color_type, (depths, _) in FORMATS.items() for depth in depths]
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

Chunks = list[tuple[bytes, bytes]]


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def join(chunks: Chunks) -> bytes:
    return SIGNATURE + b"".join(chunk(name, data) for name, data in chunks)


def split(content: bytes) -> Chunks:
    """Chunks of an undamaged file."""
    chunks, start = [], len(SIGNATURE)
    while start < len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        chunks.append((name, content[start + 8 : start + 8 + length]))
        start += 12 + length
    return chunks


def header(width: int, height: int, depth: int = 8, color_type: int = 0, interlace: int = 0) -> bytes:
    return struct.pack(">2I5B", width, height, depth, color_type, 0, 0, interlace)


def chunks_of(
    samples: np.ndarray,
    depth: int = 8,
    color_type: int = 0,
    *,
    interlace: bool = False,
    before: Chunks | None = None,
    after: Chunks | None = None,
) -> Chunks:
    """Chunks of an image with samples `h w c`; `before` and `after` are put beside the pixel data."""
    height, width, _ = samples.shape
    passes = _PASSES if interlace else ((0, 0, 1, 1),)
    rows = b"".join(_rows(samples[y::dy, x::dx], depth) for x, y, dx, dy in passes)
    return [
        (b"IHDR", header(width, height, depth, color_type, interlace)),
        *(before or []),
        (b"IDAT", zlib.compress(rows)),
        *(after or []),
        (b"IEND", b""),
    ]


def random_samples(rng: np.random.Generator, color_type: int, depth: int, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 2**depth, (height, width, FORMATS[color_type][1]))


def palette(rng: np.random.Generator, depth: int) -> np.ndarray:
    """Colors `n 3` for all samples of a depth."""
    return rng.integers(0, 256, (2**depth, 3), np.uint8)


def exif(orientation: int, order: str = ">") -> bytes:
    mark = b"MM\0*" if order == ">" else b"II*\0"
    other = (0x0100, 4, 1, 7, 0)
    tags = struct.pack(f"{order}HHIHH", *other) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return mark + struct.pack(f"{order}IH", 8, 2) + tags + struct.pack(f"{order}I", 0)


def _rows(samples: np.ndarray, depth: int) -> bytes:
    """Rows of an image or a pass, unfiltered."""
    height, width, channels = samples.shape
    if not samples.size:
        return b""
    if depth == 16:
        packed = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = (samples.reshape(height, width * channels, 1) >> np.arange(depth - 1, -1, -1)) & 1
        packed = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in packed)
