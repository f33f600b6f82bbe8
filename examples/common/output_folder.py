"""Lock of the folder that a command writes to, and removal of temporary files of killed commands."""

from __future__ import annotations

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


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed commands have left in a folder, if it exists."""
    for path in folder.glob("*.partial"):
        if re.search(rf"\.{PARTIAL}$", path.name):
            path.unlink(missing_ok=True)
