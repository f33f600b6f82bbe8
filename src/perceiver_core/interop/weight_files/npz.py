"""Reader of NumPy `.npz` files that checks the headers of all arrays before it allocates memory for them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from numpy.lib import format as npy

from perceiver_core.error_messages import errors_of
from perceiver_core.interop.weight_files.array_header import (
    LONGEST_NAME,
    Array,
    ArrayHeader,
    checked_shape,
    number_dtype,
)
from perceiver_core.interop.weight_files.zip_archive import BoundedFile, open_archive

LARGEST_RATIO = 16  # array bytes per file byte; compressed weights reach about 2
DAMAGED = "{} is not a complete .npz file of NumPy"


@contextmanager
def open_npz(path: Path) -> Iterator[dict[str, ArrayHeader]]:
    """Context manager that yields a dictionary of the array headers in an `.npz` file, keyed by name.

    On exit, the file is closed, and the arrays can no longer be read.

    Raises:
        ValueError: If the file is damaged, or if it contains anything but numeric arrays.
        ValueError: If the arrays have more than `LARGEST_RATIO` times as many bytes as the file.
    """
    size, total = path.stat().st_size, 0
    headers: dict[str, ArrayHeader] = {}
    with BoundedFile(path) as file:
        with errors_of(DAMAGED.format(path)):
            archive = open_archive(file)
            for member in archive.infolist():
                name = member.filename[:LONGEST_NAME]
                compression_known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if name != member.filename or not name.endswith(".npy") or not compression_known:
                    raise ValueError(f"it holds {name}, which is no array of NumPy's as numpy.savez writes them")
                with errors_of(name):
                    headers[name.removesuffix(".npy")] = _read_header(path, archive, member)
                total += member.file_size
                if total > LARGEST_RATIO * size:
                    raise ValueError(f"its arrays take more than {LARGEST_RATIO} times the {size} bytes of the file")
        yield headers


def _read_header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ArrayHeader:
    """Read the array header of one member of the archive, and check that it matches the size of the member."""
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError("its header is not of version 1.0, in which arrays of numbers are written")
        shape, _, dtype = npy.read_array_header_1_0(file)
        header = ArrayHeader(checked_shape(shape), number_dtype(dtype.str), partial(_read_array, path, archive, member))
        if (expected := file.tell() + header.num_bytes) != member.file_size:
            raise ValueError(f"it has {member.file_size} bytes; its shape {shape} and dtype {dtype} take {expected}")
    return header


def _read_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with errors_of(DAMAGED.format(path)), archive.open(member) as file:
        array: Array = npy.read_array(file, allow_pickle=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
