"""Reader of NumPy's `.npz` files that checks all headers before it allocates memory for arrays."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from numpy.lib import format as npy

from perceiver_core.interop.weight_files.array_header import (
    LONGEST_NAME,
    Array,
    ArrayHeader,
    check_file_size,
    checked_shape,
    number_dtype,
)

LARGEST_DIRECTORY = 4 * 2**20  # bytes, enough for some 60 thousand arrays
LARGEST_RATIO = 16  # bytes of the arrays per byte of the file; compressed weights reach 2


class _BoundedFile(io.FileIO):
    """File that refuses to read a long zip directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY:
            raise ValueError(f"its directory, or a piece of it, has {size} bytes")
        return super().read(-1 if size is None else size)


@contextmanager
def open_npz(path: Path) -> Iterator[dict[str, ArrayHeader]]:
    """Yield the headers of an `.npz` by name; arrays can be read until the context ends.

    Raises:
        ValueError: The file is damaged, holds something other than arrays of numbers, or its arrays take far more
            memory than the file.
    """
    size = check_file_size(path)
    with _BoundedFile(path) as file:
        with _errors_with_path(path):
            archive = zipfile.ZipFile(file)  # holds nothing but the file, so it is closed with it
            headers: dict[str, ArrayHeader] = {}
            total = 0
            for member in archive.infolist():
                name, header = _read_header(path, archive, member)
                if name in headers:
                    raise ValueError(f"it holds {name} twice")
                total += member.file_size
                if total > LARGEST_RATIO * size:
                    raise ValueError(f"its arrays take more than {LARGEST_RATIO} times the {size} bytes of the file")
                headers[name] = header
        yield headers


def _read_header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, ArrayHeader]:
    """Return the name and header of a member, whose size must agree with the header."""
    name = member.filename
    if (
        not name.endswith(".npy")
        or len(name) > LONGEST_NAME
        or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    ):
        raise ValueError(f"it holds {name[:LONGEST_NAME]}, which is no array of NumPy's as numpy.savez writes them")
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"the header of {name} is not of version 1.0, in which arrays of numbers are written")
        try:
            shape, _, dtype = npy.read_array_header_1_0(file)
            header = ArrayHeader(
                checked_shape(shape), number_dtype(dtype.str), partial(_read_array, path, archive, member)
            )
        except (ValueError, MemoryError, RecursionError) as error:  # the last two: text nested too deep to parse
            raise ValueError(f"{name}: {error}") from error
        expected = file.tell() + header.num_bytes
    if expected != member.file_size:
        raise ValueError(f"{name} has {member.file_size} bytes; its shape {shape} and dtype {dtype} take {expected}")
    return name.removesuffix(".npy"), header


def _read_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with _errors_with_path(path), archive.open(member) as file:
        array: Array = npy.read_array(file, allow_pickle=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)


@contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Convert the various exceptions that damaged headers raise to a ValueError that names the file."""
    expected = ValueError, TypeError, KeyError, IndexError, SyntaxError, EOFError, OSError, RuntimeError
    try:
        yield
    except (*expected, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .npz of NumPy's: {error}") from error
