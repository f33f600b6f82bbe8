"""A training that is killed and resumed ends with the same files as an uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are forked")
def test_a_training_that_is_killed_twenty_times_ends_as_without_kills(tmp_path: Path) -> None:
    """A quarter of the kills are after a random time, the others at an access to a file, some of them torn."""
    # In a process of its own: it forks, and this one may have threads.
    command = [sys.executable, "-m", "tests.robustness.kills", "--kills", "20", "--others", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert {"kill: equal after 20 faults", "other: equal after 6 faults"} <= set(done.stdout.splitlines())
