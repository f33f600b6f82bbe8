"""A script under torchrun, and under its elastic restarts: a worker that dies does not change the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import perceiver_core as pc

pytestmark = [pytest.mark.no_shape_checks, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    paths = os.pathsep.join([str(ROOT), str(Path(pc.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = {**os.environ, **loopback, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    # Without it, restarted gloo workers find the addresses of those before them, and connect to them (PyTorch 2.13).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    options += ["--max-restarts", "1", "--monitor-interval", "0.1", "-m", "tests.ecosystem.torchrun_script"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(folder), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_worker_that_dies_resumes_to_the_same_result(tmp_path: Path) -> None:
    results = {name: torchrun(tmp_path / name, *arguments) for name, arguments in (("whole", ()), ("died", ("2",)))}
    for name, result in results.items():
        assert result.returncode == 0, f"{name}: {result.stderr[-2000:]}"
    starts = [(tmp_path / name / "started_at.txt").read_text() for name in results]
    assert starts == ["0", "2"]
    whole, died = (pc.load(tmp_path / name / "model").state_dict() for name in results)
    torch.testing.assert_close(died, whole, rtol=0, atol=0)
