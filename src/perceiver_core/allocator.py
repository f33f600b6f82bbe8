"""Memory allocator setting for glibc that returns freed memory to the system."""

from __future__ import annotations

import ctypes
import platform

LARGE = 2**18  # bytes
M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_memory() -> bool:
    """Make glibc return blocks of 256 KiB or more to the system as soon as they are freed, in the whole process.

    By default, glibc raises this threshold to as much as 32 MiB at runtime, and keeps smaller blocks in its heap.
    Before version 2.38, the heap hardly reuses the aligned blocks that PyTorch allocates, so a process grows to several
    times the memory that it uses. With this setting, each new large tensor costs more time, because the system zeroes
    its memory.

    Returns:
        True if the setting was applied, or False if the system does not use glibc.

    Example:
        >>> from perceiver_core.allocator import return_freed_memory
        >>> done = return_freed_memory()
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
