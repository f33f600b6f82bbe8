"""Copies of what a contest computes on, taken in turns, so that no call finds its inputs in the GPU's cache.

A small input that is read again and again stays in the L2 cache, and the time is that of the cache. In a model every
input is new. So a contest is set up several times, until its copies together are several times as large as the cache,
and each call, of whichever candidate, takes the next copy. What is larger than that by itself needs no copies; on the
CPU there are none either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CACHES = 4  # that the copies would fill
MOST = 64  # copies, where they are tiny


def states(setup: Callable[[str], Any], device: str, *, rotates: bool = True) -> list[Any]:
    """What calls take turns in."""
    if not device.startswith("cuda") or not rotates:
        return [setup(device)]
    before = torch.cuda.memory_allocated()
    first = setup(device)
    held = torch.cuda.memory_allocated() - before
    return [first, *(setup(device) for _ in range(copies(held, cache=_cache(device)) - 1))]


def copies(held: int, *, cache: int) -> int:
    """How many copies of so many bytes there are for a cache of so many bytes."""
    return min(MOST, max(1, -(-CACHES * cache // max(1, held))))


def _cache(device: str) -> int:
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size
