"""The helper that runs the other tests in several processes."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ecosystem.processes import run

pytestmark = pytest.mark.no_shape_checks


def total(x: torch.Tensor) -> tuple[int, torch.Tensor]:
    x = x * (1 + dist.get_rank())
    dist.all_reduce(x)
    return dist.get_rank(), x


def test_each_process_returns_its_result():
    results = run(total, torch.tensor([1.0, 2.0]), world=3)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(x.tolist() == [6.0, 12.0] for _, x in results)


def fails_at_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("of process one")
    dist.barrier()


def exits_at_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def sleeps() -> None:
    time.sleep(60)


def test_an_exception_of_a_process_is_raised():
    with pytest.raises(KeyError, match="of process one") as caught:
        run(fails_at_one)
    assert "fails_at_one" in str(caught.value.__cause__)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match=r"process 1 ended with exit code 7|Connection closed"):
        run(exits_at_one)


def test_a_process_that_hangs_is_killed():
    with pytest.raises(TimeoutError, match="did not return in time"):
        run(sleeps, timeout=3)


def environment() -> tuple[str, str, bool]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], dist.is_initialized()


def test_without_a_group_there_are_the_variables_of_torchrun():
    assert run(environment, group=False) == [("0", "2", False), ("1", "2", False)]


def test_processes_have_one_thread():
    assert run(torch.get_num_threads, world=1) == [1]
    assert sys.platform != "linux" or run(os.getpid, world=1) != [os.getpid()]
