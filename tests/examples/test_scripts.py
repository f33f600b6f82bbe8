"""Commands run by their path, from any folder, and explain their options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("examples", "benchmarks", "tools", "docs", "src")
SCRIPTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
# Runs all scripts in one process, which imports PyTorch once. `runpy` does not set the path as `python <script>` does.
RUN_ALL = """
import contextlib, io, json, runpy, sys
results, path = {}, sys.path[1:]
for script in sys.argv[1:]:
    for option in ("--help", "--no-such-option"):
        for name in [name for name in sys.modules if name.split(".")[0] in ("examples", "benchmarks")]:
            del sys.modules[name]
        sys.path[:], sys.argv = [script.rpartition("/")[0], *path], [script, option]
        code, output, errors = None, io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except Exception as error:
            code = repr(error)
        results.setdefault(script, []).append([code, output.getvalue()[:6], errors.getvalue()[:6]])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_every_command_runs_by_its_path_from_another_folder(tmp_path: Path) -> None:
    """With --help and with an unknown option, nothing is done, and the exit code is 0 or 2."""
    names = [path.as_posix() for path in SCRIPTS]
    assert len(names) > 20
    figures = {path: path.stat().st_mtime_ns for path in [ROOT / "constraints.txt", *(ROOT / "docs").rglob("*.png")]}
    ran = subprocess.run([sys.executable, "-c", RUN_ALL, *names], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])
    assert results == {name: [[0, "usage:", ""], [2, "", "usage:"]] for name in names}
    assert {path: path.stat().st_mtime_ns for path in figures} == figures
    assert not list(tmp_path.iterdir())


def test_a_script_runs_from_another_folder(tmp_path: Path) -> None:
    script = ROOT / "examples" / "akoa" / "generate_labels.py"
    ran = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: "), ran.stderr
