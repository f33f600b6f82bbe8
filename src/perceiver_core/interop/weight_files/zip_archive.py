"""Zip archives that all readers interpret in the same way, with verified checksums.

The format allows bytes before, between and after the entries, several directories, and headers of entries that
contradict the directory. Readers interpret these differently, and PyTorch's reader verifies no checksums. Therefore,
only plain archives are read: entries that follow each other from the first byte on, the directory, and its end record.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections import Counter
from pathlib import Path

LARGEST_DIRECTORY = 4 * 2**20  # bytes, enough for some 60 thousand entries
_CHUNK = 2**20  # bytes
_ENTRY, _END, _END_64, _LOCATOR = (
    struct.Struct(f"<{fields}") for fields in ("4s5H3L2H", "4s4H2LH", "4sQ2H2L4Q", "4sLQL")
)
_DESCRIPTORS = {16: struct.Struct("<4s3L"), 24: struct.Struct("<4sL2Q")}  # data descriptors, keyed by their size
_STREAMED, _KNOWN_FLAGS = 0x8, 0x80E  # 0x80E: streamed, compression level, names in UTF-8
_LARGEST_16, _LARGEST_32 = 2**16 - 1, 2**32 - 1
_IN_EXTRA = (_LARGEST_32, _LARGEST_32)  # sizes that are stored in the field of 64-bit sizes instead
_DIRECTORY_ENTRY = 46  # bytes without name, extra fields and comment


class BoundedFile(io.FileIO):
    """File that limits the size of each read, so that a malicious zip directory cannot exhaust memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes. Raise ValueError if `size` exceeds `LARGEST_DIRECTORY`."""
        if size is not None and size > LARGEST_DIRECTORY:
            raise ValueError(f"its directory, or a piece of it, has {size} bytes")
        return super().read(-1 if size is None else size)


def open_archive(file: BoundedFile) -> zipfile.ZipFile:
    """Open a zip archive, and check that all headers agree with its directory. Contents are not read.

    Raises:
        ValueError: If the file is not a zip archive, or if readers could differ in what it contains.
    """
    try:
        archive = zipfile.ZipFile(file)  # not closed: it holds no resource but `file`
    except Exception as error:  # of many types
        raise ValueError(f"it is damaged or incomplete: {error}") from error
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    _check_end(file, archive, entries)
    if twice := [name for name, count in Counter(archive.namelist()).items() if count > 1]:
        raise ValueError(f"it holds {twice[0]} twice")
    starts = [*(entry.header_offset for entry in entries), archive.start_dir]
    if starts[0] != 0:
        raise ValueError("bytes precede the archive")
    for entry, end in zip(entries, starts[1:], strict=True):
        if not _is_entry(file, entry, end):
            raise ValueError(f"the header of {entry.filename} is damaged, or contradicts the directory of the archive")
    return archive


def verify_checksums(archive: zipfile.ZipFile) -> None:
    """Read all entries in small pieces and verify their checksums.

    Raises:
        ValueError: If an entry does not have its checksum.
    """
    for entry in archive.infolist():
        try:
            with archive.open(entry) as file:
                size = sum(len(piece) for piece in iter(lambda: file.read(_CHUNK), b""))
        except Exception as error:  # BadZipFile, or an error of the decompression
            raise ValueError(f"{entry.filename} is damaged ({error})") from error
        if size != entry.file_size:
            raise ValueError(f"{entry.filename} is damaged ({size} bytes instead of {entry.file_size})")


def verify_archive(path: Path) -> None:
    """Check that a file is a zip archive that all readers interpret in the same way, and verify its checksums.

    Raises:
        ValueError: If the file is damaged, or is not such an archive.
    """
    with BoundedFile(path) as file:
        verify_checksums(open_archive(file))


def is_zip(path: Path) -> bool:
    """Return whether a file begins like a zip archive."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_end(file: BoundedFile, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    """Check that the archive ends with the directory and its end record, and that its 64-bit form, if any, agrees."""
    end, directory = os.fstat(file.fileno()).st_size, archive.start_dir
    length = sum(_DIRECTORY_ENTRY + len(_encoded_name(e)) + len(e.extra) + len(e.comment) for e in entries)
    expected = (0, 0, len(entries), len(entries), length, directory)
    place = end - _END.size
    signature, *short, comment = _END.unpack(_read(file, place, _END.size))
    valid = signature == b"PK\5\6" and comment == 0
    if large := place - directory - length:
        record, locator = place - _END_64.size - _LOCATOR.size, place - _LOCATOR.size
        valid = valid and large == _END_64.size + _LOCATOR.size
        valid = valid and _LOCATOR.unpack(_read(file, locator, _LOCATOR.size)) == (b"PK\6\7", 0, record, 1)
        signature, size, _, _, *long = _END_64.unpack(_read(file, record, _END_64.size))
        valid = valid and (signature, size, *long) == (b"PK\6\6", _END_64.size - 12, *expected)
        limits = 4 * [_LARGEST_16] + 2 * [_LARGEST_32]
        valid = valid and all(a in (b, limit) for a, b, limit in zip(short, expected, limits, strict=True))
    else:
        valid = valid and tuple(short) == expected
    if not valid:
        raise ValueError("bytes precede or follow its entries, or its directory is damaged")


def _is_entry(file: BoundedFile, entry: zipfile.ZipInfo, end: int) -> bool:
    """Return whether an entry extends from its offset to `end`, with the values that the directory states."""
    start, name = entry.header_offset, _encoded_name(entry)
    header = _read(file, start, _ENTRY.size)
    if len(header) < _ENTRY.size:
        return False
    signature, _, flags, method, _, _, checksum, packed, size, name_size, extra_size = _ENTRY.unpack(header)
    same = (signature, flags, method) == (b"PK\3\4", entry.flag_bits, entry.compress_type)
    same = same and entry.filename == entry.orig_filename  # they differ if the name contains a null character
    if not same or flags & ~_KNOWN_FLAGS or _read(file, start + _ENTRY.size, name_size) != name:
        return False
    extra = _read(file, start + _ENTRY.size + name_size, extra_size)
    sizes = _sizes_in(extra) if (packed, size) == _IN_EXTRA else (packed, size)
    values = entry.CRC, entry.compress_size, entry.file_size
    descriptor = end - (start + _ENTRY.size + name_size + extra_size + entry.compress_size)
    if not flags & _STREAMED:
        return descriptor == 0 and (checksum, *sizes) == values
    if descriptor not in _DESCRIPTORS or any(a not in (0, b) for a, b in zip((checksum, *sizes), values, strict=True)):
        return False
    return _DESCRIPTORS[descriptor].unpack(_read(file, end - descriptor, descriptor)) == (b"PK\7\x08", *values)


def _sizes_in(extra: bytes) -> tuple[int, int]:
    """Return the compressed and the original size in the extra field of 64-bit sizes, or (-1, -1) without it."""
    while len(extra) >= 4:
        tag, length = struct.unpack("<2H", extra[:4])
        if tag == 1 and length >= 16 and len(extra) >= 20:
            size, packed = struct.unpack("<2Q", extra[4:20])
            return packed, size
        extra = extra[4 + length :]
    return -1, -1


def _encoded_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def _read(file: BoundedFile, start: int, size: int) -> bytes:
    """Read `size` bytes from `start`, or fewer at the end of the file."""
    file.seek(max(0, start))
    return file.read(size)
