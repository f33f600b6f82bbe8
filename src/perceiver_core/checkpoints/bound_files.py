"""Pairs of files that are replaced together: a data file, and a JSON file that contains its SHA-256 digest.

A file system can rename one file atomically, but not two. The new data file is therefore first stored beside the old
one, under a name that contains its digest. The change takes effect when the new JSON file is renamed: readers look for
the data file that the JSON file describes under both names. Finally, the new data file is renamed to its usual name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from perceiver_core.atomic_files import PARTIAL, Content, rename, staged, write_atomically
from perceiver_core.checkpoints.folder import read_at_most

T = TypeVar("T")
C = TypeVar("C")
ATTEMPTS = 100  # a reader starts again if a writer has replaced the files in the meantime
_BLOCK = 2**22  # bytes
_DIGITS = 16  # of the digest, in the name of a data file that has not been renamed yet


def write_pair(data: Path, content: Content, description: Path, describe: Callable[[str], str]) -> None:
    """Replace a data file and the JSON file that describes it.

    Readers that use `read_pair` get either both old or both new files, at any moment and after any crash. On systems
    with flock, several writers take turns.

    Args:
        data: Path of the data file.
        content: Content of the data file; see `atomic_files`.
        description: Path of the JSON file, in the same folder.
        describe: Function that returns the text of the JSON file. Its argument is the digest of the data file.

    Raises:
        OSError: If a file cannot be written. The old files are unchanged.
    """
    with _exclusive(data.parent), staged({data: content}) as staged_paths:
        digest = sha256(staged_paths[data])
        text, new = describe(digest), _path_until_renamed(data, digest)
        try:
            rename(staged_paths[data], new)
            write_atomically({description: text})
        finally:  # also after an interrupt between the renames
            if not description.is_file() or description.read_bytes() != text.encode():
                new.unlink(missing_ok=True)
        rename(new, data)
        _remove_left_over(data, description)


def read_pair(
    data: Path,
    description: Path,
    parse: Callable[[bytes], tuple[C, str | None]],
    load: Callable[[C, Path], T],
) -> T:
    """Read a data file together with the JSON file that describes it.

    Args:
        data: Path of the data file.
        description: Path of the JSON file, in the same folder.
        parse: Function that returns the content of the JSON file and the digest in it, None for files without digest.
        load: Function that returns the result. Its arguments are the content of the JSON file and the current path
            of the data file.

    Raises:
        FileNotFoundError: If one of the files does not exist.
        ValueError: If the data file is not the one that the JSON file describes.
    """
    failed: object = ()
    for _ in range(ATTEMPTS):
        version = _version(description)
        try:
            content, digest = parse(_read(description))
            path = _current_path(data, digest)
            result = load(content, path)
            if digest is not None and sha256(path) != digest:
                raise ValueError(
                    f"{data} is not the file that {description.name} describes: its SHA-256 digest differs. Copy both "
                    "from one save. To change a model, load it, change it in Python and save it again"
                )
        except Exception:  # safe_open raises errors of several types
            if failed == version == _version(description):
                raise
            failed = version  # a writer may have renamed a file in the meantime, so they are read once more
            continue
        if _version(description) == version:
            return result
    raise OSError(f"{description} and {data.name} are replaced faster than they can be read; load them again later")


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read(description: Path) -> bytes:
    if not description.is_file():
        raise FileNotFoundError(f"{description} does not exist; pass the folder that save wrote")
    return read_at_most(description)


def _current_path(data: Path, digest: str | None) -> Path:
    """Return the current path of a data file."""
    if digest is not None and (new := _path_until_renamed(data, digest)).is_file():
        return new
    if not data.is_file():
        raise FileNotFoundError(f"{data} does not exist; pass the folder that save wrote")
    return data


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return numbers that change if a file is replaced, even by one with the same content, or None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _path_until_renamed(data: Path, digest: str) -> Path:
    return data.with_name(f"{data.name}.{digest[:_DIGITS]}")


def _remove_left_over(data: Path, description: Path) -> None:
    """Remove the files that interrupted writers have left under other names."""
    names = "|".join(re.escape(path.name) for path in (data, description))
    pattern = re.compile(rf"({names})\.([0-9a-f]{{{_DIGITS}}}|{PARTIAL})")
    for file in data.parent.iterdir():
        if pattern.fullmatch(file.name):
            file.unlink(missing_ok=True)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Context manager that waits until no other process or thread writes to a folder.

    It does nothing on systems and file systems without flock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # for processes that were forked in the meantime, too
        os.close(handle)
