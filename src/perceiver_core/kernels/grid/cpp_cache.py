"""Compiled libraries in the user's cache folder.

The name of a file ends in the SHA-256 digest of its content. Files are created by renaming, so that a file is complete
as soon as it exists, and a file that was changed afterwards does not match its name. Libraries that other versions of
this package, other compilers or other processors use have other names. They are kept, because the folder may be shared
by several machines; each has about 0.2 MB. All files can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from perceiver_core.atomic_files import write_atomically

MAX_BYTES = 2**26


def cache_folder() -> Path | None:
    """Return the cache folder, or None if it cannot be used.

    Libraries in the folder are executed, so the folder is used only if no other user can write to it.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (parent if parent.is_absolute() else Path.home() / ".cache") / "perceiver-core"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # `Path.home` raises RuntimeError if the user has no home folder
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if private else None


def stored(folder: Path | None, name: str) -> list[Path]:
    """Return the paths of the libraries with this name. Their content has not been checked."""
    with suppress(OSError):
        return sorted(folder.glob(f"{name}-*.so")) if folder is not None else []
    return []


def read(path: Path) -> bytes:
    """Return the content of a library in the cache folder.

    Raises:
        OSError: If the file does not match the digest in its name, is not a regular file, is too large, belongs to
            another user, or can be written by one.
    """
    content = read_private_file(path)
    if path.stem.rpartition("-")[2] != hashlib.sha256(content).hexdigest():
        raise OSError(f"{path} is damaged")
    return content


def read_private_file(path: Path) -> bytes:
    """Return the content of a file that only this user can change. Raises OSError for other files."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not wait
    handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise OSError(f"{path} is not a file of at most {MAX_BYTES} bytes")
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            raise OSError(f"{path} can be changed by another user")
        return file.read(MAX_BYTES)


def store(folder: Path, name: str, content: bytes) -> None:
    """Store a library, and delete damaged files with the same name. Has no effect if the disk is full."""
    path = folder / f"{name}-{hashlib.sha256(content).hexdigest()}.so"
    with suppress(OSError):
        for other in stored(folder, name):
            _delete_damaged(other)
        write_atomically({path: content})
        path.chmod(0o600)  # `read` refuses it if the umask lets a group write


def _delete_damaged(path: Path) -> None:
    try:
        read(path)
    except OSError:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
