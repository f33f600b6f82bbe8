"""Machine code of the Triton kernels. Their results are compared in the Triton cases of test_operator*.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import perceiver_core

COMPILE = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability: int) -> None:
    """Few channels stay in registers, and threads exchange nothing; many channels fit into 99 KB of shared memory."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(Path(perceiver_core.__file__).parents[1])}
    command = [sys.executable, COMPILE, str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    for kernel in map(json.loads, run.stdout.splitlines()):
        if kernel["channels"] <= 4:
            assert kernel["shared"] == 0 and kernel["shuffles"] == 0 and kernel["barriers"] <= 1, kernel
        assert kernel["shared"] <= 99 * 1024, kernel
