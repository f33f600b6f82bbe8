"""Damaged PNG files, which are read as an 8-bit gray image or refused with an error that names the file."""

from __future__ import annotations

import io
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from examples.akoa.dataset.images import UnreadableImageError, read_image
from tests.akoa import png_files
from tests.akoa.png_files import CASES, Chunks

NAME = "picture.png"
MAX_SECONDS = 20.0  # much more than needed, since other processes may run
MAX_BYTES = 512 * 2**20
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_CHUNK_NAMES = re.findall(b"....", b"IHDRPLTEtRNSIDATIENDeXIfacTLfcTLfdATiCCPzTXtiTXtgAMA")


def run_case(seed: int, folder: Path) -> str:
    """Damage an image and read it. Raises AssertionError if the result or the error is not as documented."""
    rng = np.random.default_rng(seed)
    content = undamaged(rng)
    damages = [_DAMAGES[rng.integers(len(_DAMAGES))] for _ in range(rng.integers(1, 4))] if rng.random() < 0.95 else []
    for damage in damages:
        content = damage(content, rng)
    path = folder / NAME
    path.write_bytes(content)
    size = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    start, before = time.perf_counter(), _peak_memory()
    try:
        image = read_image(path, size)
    except UnreadableImageError as error:
        assert damages, f"an undamaged image is refused: {error}"
        assert NAME in str(error), str(error)
        assert str(error).isprintable(), str(error)
        outcome = "refused"
    else:
        assert image.shape == size, image.shape
        assert image.dtype == np.uint8, image.dtype
        outcome = "read" if damages else "undamaged"
    assert time.perf_counter() - start < MAX_SECONDS, f"{time.perf_counter() - start:.1f} s"
    assert _peak_memory() - before < MAX_BYTES, f"{_peak_memory() - before:,} bytes"
    return outcome


def undamaged(rng: np.random.Generator) -> bytes:
    """Return a valid file of a random format, size and writer, with or without optional chunks."""
    height, width = (int(n) for n in rng.integers(1, 40, 2))
    if rng.random() < 0.4:
        levels = rng.integers(0, 256, (height, width), np.uint8)
        mode = _MODES[rng.integers(len(_MODES))]
        image = (
            Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
        )
        file = io.BytesIO()
        image.save(file, "PNG", optimize=bool(rng.integers(2)))
        return file.getvalue()
    color_type, depth = CASES[rng.integers(len(CASES))]
    samples = png_files.random_samples(rng, color_type, depth, height, width)
    before: Chunks = [(b"tEXt", b"a\0b")] if rng.integers(2) else []
    if color_type == 3:
        before.append((b"PLTE", png_files.palette(rng, depth).tobytes()))
    if rng.integers(2) and color_type < 4 and (color_type, depth) != (2, 16):
        alpha = (
            rng.bytes(int(rng.integers(1, 1 + 2**depth))) if color_type == 3 else samples[0, 0].astype(">u2").tobytes()
        )
        before.append((b"tRNS", alpha))
    orientation = [(b"eXIf", png_files.exif(int(rng.integers(1, 9))))] if rng.integers(2) else []
    interlace = bool(rng.integers(2))
    return png_files.join(
        png_files.chunks_of(samples, depth, color_type, interlace=interlace, before=before, after=orientation)
    )


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(content), int(rng.integers(1, 9)))):
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content) + 1)]


def _splice(content: bytes, rng: np.random.Generator) -> bytes:
    other = undamaged(rng)
    return content[: rng.integers(len(content) + 1)] + other[rng.integers(len(other)) :]


def _random(content: bytes, rng: np.random.Generator) -> bytes:
    start = png_files.SIGNATURE if rng.integers(2) else b""
    return start + rng.bytes(int(rng.integers(0, 200)))


def _edit_chunks(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, remove, duplicate, move or add a chunk, with correct checksums."""
    try:
        chunks = png_files.split(content)
        at = int(rng.integers(len(chunks)))
        name, data = chunks[at]
    except Exception:  # damaged already
        return _flip(content, rng)
    edit = rng.integers(6)
    if edit == 0:
        chunks[at] = name, _flip(data, rng) if data else rng.bytes(3)
    elif edit == 1:
        del chunks[at]
    elif edit == 2:
        chunks.insert(int(rng.integers(len(chunks) + 1)), (name, data))
    elif edit == 3:
        order = rng.permutation(len(chunks))
        chunks = [chunks[i] for i in order]
    elif edit == 4:
        added = _CHUNK_NAMES[rng.integers(len(_CHUNK_NAMES))]
        chunks.insert(at, (added, rng.bytes(int(rng.integers(0, 40)))))
    else:
        chunks[at] = _CHUNK_NAMES[rng.integers(len(_CHUNK_NAMES))], data
    return png_files.join(chunks)


def _edit_header(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a field of the header, such as the size, with correct checksums."""
    try:
        (name, data), *others = png_files.split(content)
    except Exception:  # damaged already
        return _flip(content, rng)
    changed = bytearray(data.ljust(13, b"\0"))
    if rng.integers(2):
        numbers = (0, 1, 7, 1_000, 5_000, 20_000, 2**31 - 1, 2**32 - 1)
        for at in (0, 4):
            if rng.integers(2):
                changed[at : at + 4] = numbers[rng.integers(len(numbers))].to_bytes(4, "big")
    else:
        changed[rng.integers(8, 13)] = rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 16, 255])
    return png_files.join([(name, bytes(changed)), *others])


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_DAMAGES = (_flip, _cut, _splice, _random, _edit_chunks, _edit_chunks, _edit_chunks, _edit_header, _edit_header)
