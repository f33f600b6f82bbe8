"""Checks and locks of the folders that commands write to, and removal of temporary files of killed commands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from perceiver_core.atomic_files import PARTIAL

LOCK = ".lock"


@contextmanager
def output_folder(folder: Path, *subfolders: str) -> Iterator[None]:
    """Create a folder and lock it. The system releases the lock when the process ends, even if it is killed.

    Args:
        folder: Folder that the command writes to, created if necessary.
        subfolders: Names of folders in it. Temporary files in the folder and in these are removed.

    Raises:
        OSError: The folder cannot be created or written to.
        ValueError: Another command has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout:
            raise ValueError(
                f"{folder}: another command works in this folder at the moment; wait until it ends, or choose another "
                "folder"
            ) from None
        for place in (folder, *(folder / name for name in subfolders)):
            remove_temporary_files(place)
        yield


def check_output_file(path: Path, argument: str) -> None:
    """Check that a file can be written, before the work for it begins.

    Args:
        path: File that will be written.
        argument: Name of the argument, for the error.

    Raises:
        ValueError: Its folder does not exist or cannot be written to, or the path is a folder, a pipe or a device.
    """
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"{argument}: {str(path)!r} is not a file in a folder that can be written to; choose an existing folder "
            "that you may write to"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{argument}: {str(path)!r} is not a regular file; choose another path")


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed commands have left in a folder, if it exists."""
    for path in folder.glob("*.partial"):
        if re.search(rf"\.{PARTIAL}$", path.name):
            path.unlink(missing_ok=True)
