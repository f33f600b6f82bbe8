"""Orientation of an image, as a number from 1 (as stored) to 8, in the metadata of PNG files."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence

_ORIENTATION = 0x0112  # tag in Exif data
_MAX_TEXT = 2**20  # bytes
_PROFILES = (b"Raw profile type exif", b"Raw profile type APP1")  # Exif data in hexadecimal digits
_XMP = b"XML:com.adobe.xmp"
_IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([0-9]+)""")


def exif_orientation(exif: bytes) -> int:
    """Return the orientation in Exif data, from 1 (as stored) to 8; 1 if it is missing."""
    exif = exif.removeprefix(b"Exif\0\0")
    if not exif:
        return 1
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            raise ValueError("it is not in TIFF format")
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        entries = (struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i) for i in range(count))
        orientation = next((value for tag, _, _, value in entries if tag == _ORIENTATION), 1)
        if orientation not in range(1, 9):
            raise ValueError(f"the orientation is {orientation}, need 1 to 8")
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"its Exif data are invalid ({error}); remove them, for example with an image editor"
        ) from error
    return orientation


def check_texts(chunks: Sequence[tuple[bytes, memoryview]]) -> None:
    """Check that no text chunk states another orientation than the chunk eXIf, or than 1 if there is no such chunk.

    Some viewers apply the orientation in a text, and others do not.

    Args:
        chunks: Name and content of each chunk of a file.

    Raises:
        ValueError: A text states another orientation, or cannot be read.
    """
    expected = exif_orientation(next((bytes(data) for name, data in chunks if name == b"eXIf"), b""))
    for name, data in chunks:
        if name not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        keyword, _, rest = bytes(data).partition(b"\0")
        if keyword not in (*_PROFILES, _XMP):
            continue
        try:
            text = _text(name, rest)
            orientation = _in_xmp(text) if keyword == _XMP else exif_orientation(_profile(text))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"its text {keyword.decode()!r} cannot be read ({error}); remove it") from error
        if orientation not in (1, expected):
            raise ValueError(
                f"its text {keyword.decode()!r} states the orientation {orientation}, which some viewers apply and "
                "others do not; save the image upright, without this text"
            )


def _text(name: bytes, rest: bytes) -> bytes:
    """Return the text of a chunk, given its content after the keyword."""
    compressed = name == b"zTXt"
    if compressed:
        rest = rest[1:]  # compression method
    elif name == b"iTXt":
        compressed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # language and translated keyword
    if compressed:
        rest = zlib.decompressobj().decompress(rest, _MAX_TEXT + 1)
    if len(rest) > _MAX_TEXT:
        raise ValueError(f"it has more than {_MAX_TEXT:,} bytes")
    return rest


def _profile(text: bytes) -> bytes:
    """Return the data of a profile, which is written as a name, the number of bytes and hexadecimal digits."""
    parts = text.split()
    return bytes.fromhex(b"".join(parts[2:]).decode("ascii"))


def _in_xmp(text: bytes) -> int:
    found = {int(number) for number in _IN_XMP.findall(text)}
    return next(iter(found - {1}), 1)
