"""Compiled reads in several processes: simultaneous first use, after fork and spawn, without a home folder."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perceiver_core.kernels.grid import cpp_library, read_grid
from tests.kernels.grid.compiled import COMPILER, built, file_names, script

__all__ = ["built", "script"]

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.skipif(COMPILER is None, reason="no compiler"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork"),
]

READ = """
import os, traceback, warnings, torch
from perceiver_core.kernels.grid import cpp, cpp_library, read_grid

def read():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 17, 5), (2, 3, 17, 7 + 11), (2, 5, 7, 11), (2, 7, 11)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    outputs = read_grid(*leaves)
    return [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], leaves)]

def in_child(check):
    if (child := os.fork()) == 0:
        try:
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    return child

def codes(children):
    return [os.waitpid(child, 0)[1] for child in children]
"""


def run(code: str, **environment: str) -> None:
    """Run code in a new process, and check that it ends without an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", READ + code]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            _, problem = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
    assert process.returncode == 0, problem.decode()


def test_first_use_by_eight_processes_and_without_a_home(
    built: Path, script: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each of the eight compiles before the others are done, in two halves, and none loads half a library."""
    wait = 'while [ $(ls "$(dirname "$0")"/*.started | wc -l) -lt 8 ]; do sleep 0.05; done'
    path = script(
        f'[ -z "$OUT" ] && exit; touch "$(dirname "$0")/$$.started"; head -c 9999 {built} >"$OUT"; {wait}; '
        f'cp {built} "$OUT"'
    )
    (tmp_path / "file").touch()
    run(
        f"""
warnings.simplefilter("error")

def check(environment):
    os.environ.update(environment)
    read()
    assert cpp_library.functions()

assert codes([in_child(lambda: check({{}})) for _ in range(8)]) == [0] * 8
homes = {{"HOME": "/proc"}}, {{"HOME": {str(tmp_path / "file")!r}}}
assert codes([in_child(lambda: check({{"XDG_CACHE_HOME": "", **home}})) for home in homes]) == [0, 0]
""",
        CXX=str(path),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert len(list(tmp_path.glob("*.started"))) == 8 + 2
    assert file_names(tmp_path / "cache" / "perceiver-core") == ["library"]


def test_forked_processes_neither_hang_nor_differ() -> None:
    """The threads of OpenMP do not exist in a child of a process that has used them: it would wait for them forever."""
    run(
        """
def check(threads):
    assert torch.get_num_threads() == threads
    several = read()
    torch.ones(2**20).exp_().log2_()  # operators of PyTorch
    torch.set_num_threads(1)
    assert all(torch.equal(a, e) for a, e in zip(several, read(), strict=True))
    assert codes([in_child(read)]) == [0]  # a child of the child

torch.set_num_threads(4)
assert codes([in_child(lambda: check(4)) for _ in range(2)]) == [0, 0]
expected = read()
assert codes([in_child(lambda: check(1)) for _ in range(2)]) == [0, 0]
assert torch.get_num_threads() == 4
assert all(torch.equal(a, e) for a, e in zip(read(), expected, strict=True))
"""
    )


def test_a_spawned_process_reads_what_its_parent_reads() -> None:
    inputs = [torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 5), torch.ones(1, 3, 5), torch.ones(1, 5)]
    expected = read_grid(*inputs)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        actual = pool.apply_async(spawned, [[x.tolist() for x in inputs]]).get(timeout=100)
    assert actual == [[x.tolist() for x in expected], bool(cpp_library.functions())]


def spawned(inputs: list[list[float]]) -> list[object]:
    outputs = read_grid(*(torch.tensor(x) for x in inputs))
    return [[x.tolist() for x in outputs], bool(cpp_library.functions())]
