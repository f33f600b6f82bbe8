"""Scripts run by their path, from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# Runs all scripts in one process, which imports PyTorch once. `runpy` does not set the path as `python <script>` does.
RUN_ALL = """
import contextlib, io, json, runpy, sys
results, path = {}, sys.path[1:]
for script in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] in ("examples", "benchmarks")]:
        del sys.modules[name]
    sys.path[:], sys.argv = [script.rpartition("/")[0], *path], [script, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        results[script] = printed.getvalue()[:6] if end.code in (0, None) else f"exit code {end.code}"
    except Exception as error:
        results[script] = repr(error)
print(json.dumps(results))
"""


@pytest.mark.slow
def test_every_script_runs_by_its_path_from_another_folder(tmp_path: Path) -> None:
    names = [path.as_posix() for path in SCRIPTS]
    assert len(names) > 15
    ran = subprocess.run([sys.executable, "-c", RUN_ALL, *names], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == dict.fromkeys(names, "usage:")


def test_a_script_runs_from_another_folder(tmp_path: Path) -> None:
    script = ROOT / "examples" / "akoa" / "generate_labels.py"
    ran = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: "), ran.stderr
