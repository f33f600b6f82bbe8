"""The same seed gives the same bits, with one thread and with two, except where docs/concepts/numerics.md says so."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.robustness.repeated import CASES, EQUAL, ROUNDING

pytestmark = pytest.mark.no_shape_checks  # shapes are checked by the tests of each part

ROOT = Path(__file__).parents[2]
OTHER = "from tests.robustness.test_determinism import digest; print(digest('training'))"


@pytest.fixture(autouse=True)
def same_settings_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@cache
def result(name: str, threads: int, *, deterministic: bool = False) -> list[Tensor]:
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(0)
    return CASES[name]()


def digest(name: str) -> str:
    """Return a hash of the result of a computation with one thread."""
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in result(name, 1))).hexdigest()


def are_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_results_repeat_with_the_same_number_of_threads(name):
    """The second run uses deterministic algorithms, which neither raise an error nor change a result."""
    once, again = result(name, 2), result(name, 2, deterministic=True)
    assert are_equal(once, again)


@pytest.mark.parametrize("name", EQUAL)
def test_results_do_not_depend_on_the_number_of_threads(name):
    assert are_equal(result(name, 1), result(name, 2))


@pytest.mark.parametrize("name", ROUNDING)
def test_results_that_depend_on_the_number_of_threads_differ_by_rounding(name):
    """PyTorch's matrix products add in another order. The limit is 1e-5 of the largest value of a tensor."""
    for a, b in zip(result(name, 1), result(name, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1e-3, float(a.abs().max())))


def test_results_repeat_in_another_process():
    run = subprocess.run([sys.executable, "-c", OTHER], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest("training")
