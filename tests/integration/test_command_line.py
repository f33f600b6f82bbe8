"""Exit codes and messages of `python -m perceiver_core`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from perceiver_core.__main__ import main

pytestmark = pytest.mark.no_shape_checks


@pytest.mark.refusal
def test_errors_contain_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["perceiver_core", "costs", "--\x1b[2J\nwritten: x"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert r"error: unrecognized arguments: --\x1b[2J\nwritten: x" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_stdout_may_be_closed() -> None:
    command = ["sh", "-c", 'exec "$0" -m perceiver_core costs --device none >&-', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--device must be" in done.stderr
