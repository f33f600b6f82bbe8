"""Atomic writing of files. This library, its examples and its benchmarks write all files with these functions."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

# Text (written as UTF-8 with "\n" as line ends), bytes, or a function that writes a file to the path that it is passed.
Content: TypeAlias = str | bytes | Callable[[Path], object]

_REMEDIES = {
    errno.ENOSPC: "Free space on the disk and write it again",
    errno.EDQUOT: "Free space in your quota and write it again",
    errno.EFBIG: "Raise the limit of the file size (ulimit -f) and write it again",
    errno.EROFS: "Choose a folder on a file system that is writable",
    errno.EACCES: "Choose a folder that you may write to",
    errno.EPERM: "Choose a folder that you may write to",
    errno.EEXIST: "A file has the name of the folder; choose another folder",
    errno.ENOTDIR: "A file has the name of a folder of this path; choose another folder",
}
PARTIAL = r"[0-9a-f]{16}\.partial"  # regular expression of the end of temporary names
_PROBE = b"\0" * 2**20


def write_atomically(files: Mapping[Path, Content]) -> None:
    """Write files such that each path has either its old or its new content, at any moment and after any crash.

    Each file is written under a temporary name in the same folder and flushed to the disk. When all of them are
    complete, they are renamed in the order of `files`, and each rename is flushed before the next one. After an error,
    the temporary files are removed.

    Args:
        files: Content of each file. Folders must exist.

    Raises:
        OSError: If a file cannot be written, for example because the disk is full or the folder is read-only. Files
            that existed are unchanged. If the content is written by a library that raises other errors on a full
            disk, these are replaced by OSError.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "result.txt"
        ...     write_atomically({path: "97 %"})
        ...     path.read_text()
        '97 %'
    """
    with staged(files) as temporary_paths:
        for path, temporary in temporary_paths.items():
            rename(temporary, path)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents unless they exist.

    Raises:
        OSError: If a folder cannot be created, for example because its parent is read-only.
    """
    with _explained_errors(folder, folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def staged(files: Mapping[Path, Content]) -> Iterator[dict[Path, Path]]:
    """Context manager that writes files under temporary names and returns the temporary path of each.

    The files are complete and flushed to the disk. Those that have not been renamed on exit are removed.

    Args:
        files: Content of each file. Folders must exist.

    Raises:
        OSError: As in `write_atomically`.
    """
    for path in files:
        if path.exists() and not path.is_file():  # a rename would replace even a device, such as /dev/null
            raise OSError(f"{path} is not a regular file, such as a folder, pipe or device. Choose another path")
    temporary_paths = {path: path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial") for path in files}
    try:
        for path, temporary in temporary_paths.items():
            with _explained_errors(path, temporary):
                _write(temporary, files[path])
        yield temporary_paths
    finally:
        for temporary in temporary_paths.values():
            with suppress(OSError):  # on a read-only file system, also for a missing file; it would hide the reason
                temporary.unlink(missing_ok=True)


def rename(old: Path, new: Path) -> None:
    """Rename a file within its folder and flush the folder to the disk. An existing file is replaced."""
    os.replace(old, new)
    _flush_folder(new.parent)


def _write(path: Path, content: Content) -> None:
    """Write a new file and flush it to the disk. Its permissions follow the user's umask."""
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)  # some libraries replace the file by one that only its owner may read
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush renames in a folder to the disk, on systems where a folder can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def _os_error(error: Exception, temporary: Path) -> OSError | None:
    """Return the reason why the system did not write a file, or None if the system is not the reason.

    Some libraries raise errors of their own types that do not contain the reason. For these, the reason is the error
    of another write to the same file, if it fails.
    """
    if isinstance(error, OSError):
        return error
    if not temporary.exists():
        return None
    try:
        with temporary.open("ab") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return reason
    return None


@contextmanager
def _explained_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Context manager that extends errors of the system by the state of the files and a remedy."""
    try:
        yield
    except Exception as error:
        reason = _os_error(error, temporary)
        if reason is None or reason.errno not in _REMEDIES:
            raise
        text = f"{os.strerror(reason.errno)}: {path} was not written, and existing files are unchanged"
        raise type(reason)(reason.errno, f"{text}. {_REMEDIES[reason.errno]}") from error
