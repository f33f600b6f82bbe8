"""Arrays of NumPy's `.npz` files, of which headers are read before any memory is taken."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from perceiver_core.checkpoints.held import LETTERS, Held, check_file, number, size_of

DIRECTORY = 4 * 2**20  # bytes; that of a published model would have some 60 thousand
RATIO = 16  # of what arrays take to what the file does; weights that are compressed reach 2


class _Bounded(io.FileIO):
    """A file of which a long directory is not read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY:
            raise ValueError(f"its directory, or a piece of it, has {size} bytes")
        return super().read(-1 if size is None else size)


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Held]]:
    """The arrays of an `.npz` by name, which can be read until it is closed.

    Raises:
        ValueError: it is damaged, holds something else than arrays of numbers, or they would take far more than the
            file does.
    """
    size = check_file(path)
    with _Bounded(path) as file:
        with _clear(path):
            archive = zipfile.ZipFile(file)  # closed with the file, which is all that it holds
            found: dict[str, Held] = {}
            total = 0
            for member in archive.infolist():
                name, held = _header(archive, member)
                if name in found:
                    raise ValueError(f"it holds {name} twice")
                total += member.file_size
                if total > RATIO * size:
                    raise ValueError(f"its arrays take more than {RATIO} times the {size} bytes of the file")
                found[name] = held._replace(read=partial(_read, path, archive, member, held))
        yield found


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, Held]:
    """What a member says that it is, which has to go with its size."""
    name = member.filename
    if (
        not name.endswith(".npy")
        or len(name) > LETTERS
        or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    ):
        raise ValueError(f"it holds {name[:LETTERS]}, which is no array of NumPy's as numpy.savez writes them")
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):
            raise ValueError(f"the header of {name} is not of version 1.0, in which arrays of numbers are written")
        try:
            shape, _, dtype = npy.read_array_header_1_0(file)
            wanted = file.tell() + size_of(shape, number(dtype.str))
        except (ValueError, MemoryError, RecursionError) as error:  # of parsing what is nested too deep
            raise ValueError(f"{name}: {error}") from error
    if wanted != member.file_size:
        raise ValueError(f"{name} has {member.file_size} bytes; its shape {shape} and dtype {dtype} take {wanted}")
    return member.filename.removesuffix(".npy"), Held(shape, dtype, lambda: np.empty(0))


def _read(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, held: Held) -> NDArray[Any]:
    with _clear(path), archive.open(member) as file:
        found: NDArray[Any] = npy.read_array(file, allow_pickle=False)
        return found.astype(held.dtype.newbyteorder("="), copy=False)


@contextmanager
def _clear(path: Path) -> Iterator[None]:
    """Errors that say which file; those of headers are of many kinds."""
    kinds = ValueError, TypeError, KeyError, IndexError, SyntaxError, EOFError, OSError, RuntimeError
    try:
        yield
    except (*kinds, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .npz of NumPy's: {error}") from error
