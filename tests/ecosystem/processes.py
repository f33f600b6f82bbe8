"""Runs a function in several processes of one gloo process group, and returns what each process returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    *("torch", "pytest", "perceiver_core", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.pipelining", "torch.utils.checkpoint"),
]


def run(
    function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 120, group: bool = True
) -> list[Any]:
    """Returns `[function(*args) of each rank]`, each computed in a process of its own with a single thread.

    Args:
        function: Function at the top level of a module, because it is pickled. Rank and world size are those of
            torch.distributed.
        args: Its arguments, and its result, are pickled: tensors are copied.
        world: Number of processes.
        timeout: Seconds after which all processes are killed, and a TimeoutError is raised.
        group: Whether to initialize the process group. If not, only the variables that torchrun sets are there: RANK,
            LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, for packages that initialize it themselves.

    Raises:
        Exception: The first exception of a process. Its cause contains the traceback. The other processes are killed.
    """
    methods = multiprocessing.get_all_start_methods()
    # Processes are forked from a server that has imported PyTorch already, and that has no threads.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"world": world, "port": free_port(), "store": str(Path(folder) / "store"), "timeout": timeout}
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_work, args=(rank, settings, group, pipes[rank][1], pickle.dumps((function, args))))
            for rank in range(world)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()  # so that the end of the process is the end of the pipe
            return _results([receiver for receiver, _ in pipes], processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def free_port() -> int:
    """Returns a TCP port of this machine that no program listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _results(receivers: list[Connection], processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        ranks = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in results}
        ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"processes {sorted(ranks.values())} of {len(receivers)} did not return in time")
        for receiver in ready:
            rank = ranks[receiver]  # type: ignore[index]
            try:
                result, error, text = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                raise RuntimeError(f"process {rank} ended with exit code {processes[rank].exitcode}") from None
            if text:
                raise (error or RuntimeError(text)) from RuntimeError(f"in process {rank}:\n{text}")
            results[rank] = result
    return [results[rank] for rank in range(len(receivers))]


def _work(rank: int, settings: dict[str, Any], group: bool, sender: Connection, call: bytes) -> None:
    world = settings["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(settings["port"]), OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may have no address
    torch.set_num_threads(1)
    try:
        if group:
            limit = timedelta(seconds=settings["timeout"])
            store = f"file://{settings['store']}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        function, args = pickle.loads(call)
        reply = pickle.dumps((function(*args), None, ""))
        if dist.is_initialized():
            dist.barrier()  # no process ends while another still needs it
            dist.destroy_process_group()
    except BaseException as error:
        reply = _pickled(error)
    sender.send_bytes(reply)
    sender.close()


def _pickled(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        reply = pickle.dumps((None, error, text))
        pickle.loads(reply)
    except Exception:  # an exception with arguments that its constructor does not take
        return pickle.dumps((None, None, text))
    return reply
