"""Settings of the system's memory allocator."""

from __future__ import annotations

import ctypes
import platform

LARGE = 2**18  # bytes
M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_memory() -> bool:
    """Make glibc return large blocks to the system as soon as they are freed. This affects the whole process.

    By default, glibc raises the size threshold for this to up to 32 MB and keeps smaller blocks in a heap. Before
    version 2.38, the heap hardly reuses the aligned blocks that PyTorch allocates, so a process grows to several times
    the memory that it uses. The price of this setting is that the system zeroes the memory of each new large tensor.

    Returns:
        True if the setting was applied, as on Linux with glibc, else False.

    Example:
        >>> from perceiver_core.allocator import return_freed_memory
        >>> done = return_freed_memory()
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
