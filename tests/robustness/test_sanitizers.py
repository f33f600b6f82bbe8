"""The compiled reads under sanitizers: memory errors, undefined behavior, data races, and failing allocations.

The variable SANITIZER_CASES is the number of random cases. With it, the thread sanitizer runs too.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from perceiver_core.kernels.grid import cpp_library
from tests.kernels.grid.compiled import COMPILER

HARNESS = Path(__file__).parent / "sanitizers" / "harness.cpp"
CASES = os.environ.get("SANITIZER_CASES")
FLAGS = {
    "address and undefined behavior": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}

pytestmark = [pytest.mark.no_shape_checks, pytest.mark.skipif(COMPILER is None, reason="no compiler")]


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_random_reads_and_failing_allocations(sanitizer: str, tmp_path: Path) -> None:
    """OpenMP is not used, because the thread sanitizer does not see how its threads wait for each other."""
    if sanitizer == "threads" and not CASES:
        pytest.skip("set SANITIZER_CASES to a number of cases")
    compiler = [str(COMPILER), "-std=c++17", "-Og", "-g1", "-pthread", *FLAGS[sanitizer]]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    empty = tmp_path / "empty"
    if run([*compiler, str(tmp_path / "empty.cpp"), "-o", str(empty)]).returncode or run([str(empty)]).returncode:
        pytest.skip(f"{COMPILER} has no sanitizer for {sanitizer} that works on this machine")
    harness = tmp_path / "harness"
    built = run([*compiler, "-I", str(cpp_library.SOURCE.parent), str(HARNESS), "-o", str(harness)])
    assert built.returncode == 0, built.stderr
    result = run([str(harness), CASES or "40"])
    assert result.returncode == 0, result.stderr[-5000:]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
