"""The system's memory allocator, where it keeps what PyTorch has freed."""

from __future__ import annotations

import ctypes
import platform

LARGE = 2**18  # bytes
M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_memory() -> bool:
    """Makes glibc give large blocks back to the system as soon as they are freed, for all of the process.

    As glibc comes, it raises by itself the size from which it does so, up to 32 MB, and keeps smaller blocks in a heap.
    Before version 2.38 that heap hardly reuses the aligned blocks that PyTorch asks for, so a process grows to several
    times what it holds. The price is that the system clears memory anew for each large tensor.

    Returns:
        Whether it was done: on Linux with glibc.

    Example:
        >>> from perceiver_core.allocator import return_freed_memory
        >>> done = return_freed_memory()
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
