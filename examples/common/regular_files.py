"""Reading of files at untrusted paths, without blocking on special files and with a limit on their size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Opening a pipe would otherwise wait for its other end, and opening a terminal would take control of it.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file. Links are followed.

    Args:
        path: Path of the file.
        max_bytes: Largest size that is read.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is a folder, pipe, socket or device, is larger than `max_bytes`, or is being written. The message
            does not name the file.
    """
    _checked_size(os.stat(path), max_bytes)  # before it is opened, which can have effects on a device
    with open(os.open(path, _FLAGS), "rb") as file:
        # Again, since the path may have been replaced in between.
        size = _checked_size(os.fstat(file.fileno()), max_bytes)
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError("its size changes while it is read; wait until it is written completely")
    return content


def _checked_size(status: os.stat_result, max_bytes: int) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a special file')}, need a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"it has {status.st_size:,} bytes, more than {max_bytes:,}, the limit")
    return status.st_size
