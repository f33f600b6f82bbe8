"""A function in a fresh process, where nothing that ran before can be seen."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# What a server imports once and its children find there, which computes nothing and starts no threads.
IMPORTS = ["torch", "perceiver_core", "transformers.models.perceiver.modeling_perceiver"]


def run(function: Callable[..., T], *arguments: object) -> T:
    """What a function gives in a process of its own; function, arguments and result have to be picklable.

    The process is forked from a server that has imported the library and done nothing else, where the system has
    such servers, and started from nothing elsewhere.
    """
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(IMPORTS)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
