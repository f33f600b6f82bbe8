"""The compiled reads: bounded working memory, and an error if it cannot be allocated.

The variable READ_TOKENS is the number of tokens for which the working memory is measured, for example 10000000.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from perceiver_core.kernels.grid import cpp_library, read_grid
from tests.kernels.grid.compiled import COMPILER

ROOT = Path(__file__).parents[2]
TOKENS = os.environ.get("READ_TOKENS", "300000")
pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.skipif(COMPILER is None, reason="no compiler"),
]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


def run(*command: str, **environment: str) -> list[str]:
    """Return the lines that a Python process prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2", **environment}
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=3000, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@linux
def test_working_memory_does_not_grow_with_the_grid() -> None:
    """Inputs and outputs have up to 400 MB at ten million tokens."""
    lines = run("-m", "tests.robustness.working_memory", TOKENS, MALLOC_MMAP_THRESHOLD_="16384")
    needed = {name: int(num_bytes) for name, num_bytes in (line.split(": ") for line in lines)}
    assert len(needed) == 36
    assert {name: num_bytes for name, num_bytes in needed.items() if num_bytes > 20e6} == {}


# Each read runs in a process that may use `extra` MB more than after the start. Threads need 8 MB of address space.
LIMITED_MEMORY = """
import os, resource, sys, torch
from pathlib import Path
from perceiver_core.kernels.grid import cpp, cpp_library
from perceiver_core.kernels.grid.interface import GridInputs, Upstream

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
shapes = (1, 2, 32, 3), (1, 2, 32, 50), (64, 3, 20, 30), (64, 20, 30)
inputs = GridInputs(*(torch.randn(shape, generator=generator) for shape in shapes), None)

def results():
    outputs = cpp.forward(inputs)
    upstream = Upstream(outputs.base, outputs.total, outputs.content, outputs.marginals, outputs.base)
    return [*outputs, *cpp.backward(inputs, upstream, True)]

expected = results()
for extra in [*range(16), *range(16, 128, 8)]:
    if (child := os.fork()) == 0:
        outcome = "equal"
        torch.set_num_threads(4)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + extra * 2**20,) * 2)
        try:
            actual = results()
            torch.set_num_threads(1)  # PyTorch's operators end the process if a thread cannot be started
            if not all(torch.equal(a, e) for a, e in zip(actual, expected)):
                outcome = "different"
        except MemoryError as error:
            outcome = f"MemoryError: {error}"
        except RuntimeError as error:
            outcome = "torch: can't allocate memory" if "can't allocate memory" in str(error) else repr(error)
        os.write(1, f"{outcome}\\n".encode())
        os._exit(0)
    print(f"exit code {os.waitpid(child, 0)[1]}", flush=True)
"""


@linux
def test_without_memory_a_read_is_equal_or_raises_an_error(tmp_path: Path) -> None:
    """Threads that cannot be started or have no working memory take no part."""
    script = tmp_path / "script.py"
    script.write_text(LIMITED_MEMORY)
    outcomes = Counter(line.partition(" of a structured read")[0] for line in run("-W", "ignore", str(script)))
    count = outcomes.pop("exit code 0")
    accepted = (
        "equal",
        "torch: can't allocate memory",
        "MemoryError: the forward pass",
        "MemoryError: the backward pass",
    )
    assert {*outcomes} <= {*accepted} and outcomes.total() == count == 30
    assert outcomes["equal"] > 5 and outcomes["torch: can't allocate memory"] < 28


@pytest.mark.refusal
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_missing_memory_is_a_memory_error_with_a_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = cpp_library.functions()
    failing = {key: (lambda *_: 12_345_678) if key[0] == name else call for key, call in functions.items()}
    monkeypatch.setattr(cpp_library, "functions", lambda: failing)
    inputs = (
        torch.ones(1, 1, 2, 3, requires_grad=True),
        torch.ones(1, 1, 2, 12),
        torch.ones(1, 3, 5, 7),
        torch.ones(1, 5, 7),
    )
    with pytest.raises(
        MemoryError, match=rf"the {name} pass .* over \(5, 7\) tokens could not allocate 12\.3 MB .*Free memory .*again"
    ):
        read_grid(*inputs).content.sum().backward()
