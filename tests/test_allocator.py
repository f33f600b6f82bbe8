"""Freed memory is returned to the operating system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from perceiver_core.allocator import return_freed_memory

# A process that frees every second one of many tensors, after some large ones.
PROGRAM = """
import gc, torch
from perceiver_core.allocator import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if {asked}:
    assert return_freed_memory()
del [torch.ones(2**22) for _ in range(3)][:]
tensors = [torch.ones(2**19) for _ in range(101)]  # 2 MB each
before = resident()
del tensors[::2]
gc.collect()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_returned():
    given_back = {}
    for asked in (True, False):
        run = [sys.executable, "-c", PROGRAM.format(asked=asked)]
        given_back[asked] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert given_back[True] > 90e6  # of 102 MB
    assert given_back[False] < given_back[True]


def test_other_platforms_are_not_supported(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert return_freed_memory() is False
