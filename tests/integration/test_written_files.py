"""All files are written by `atomic_files`, so that each is complete or not there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("src", "examples", "benchmarks", "tools", "docs", ".ci")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_build" not in path.parts
]
WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "save_model", "tofile", "savetxt", "savez"}
MODULE_WRITERS = {"torch.save", "np.save", "os.replace", "os.rename", "shutil.copy", "shutil.move"}
# Functions that write to the path of a temporary file, which `write_atomically` passes them, and exceptions.
WRITE_TO_A_TEMPORARY_PATH = {
    "src/perceiver_core/checkpoints/deployment.py": {"_write_exported"},
    "examples/akoa/training/laterality.py": {"_write_checkpoint"},
    "examples/akoa/evaluation/plots.py": {"write_png"},
    "examples/akoa/training/callbacks.py": {"_append"},  # the log of TensorBoard
    "src/perceiver_core/kernels/grid/cpp_library.py": {"_scratch_folder", "_library"},  # a trial; a file in memory
    "benchmarks/measurement.py": {"_measured"},  # a setting of the system, below /proc
}


def writing_calls(node: ast.AST, function: str = "", inside_lambda: bool = False) -> Iterator[tuple[int, str, str]]:
    """Line, name and enclosing function of all calls that write a file, apart from those in a lambda of a path."""
    for child in ast.iter_child_nodes(node):
        name = child.name if isinstance(child, ast.FunctionDef) else function
        of_path = inside_lambda or (isinstance(child, ast.Lambda) and child.args.args and len(child.args.args) == 1)
        if isinstance(child, ast.Call) and not inside_lambda and writes(child):
            yield child.lineno, ast.unparse(child.func), function
        yield from writing_calls(child, name, bool(of_path))


def writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in MODULE_WRITERS or (isinstance(call.func, ast.Attribute | ast.Name) and name.split(".")[-1] in WRITERS):
        return True
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    return name.split(".")[-1] in ("open", "fdopen") and any(isinstance(m, str) and set(m) & set("wax+") for m in modes)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_written_by_one_function(path):
    relative = str(path.relative_to(ROOT))
    if relative == "src/perceiver_core/atomic_files.py":
        return
    allowed = WRITE_TO_A_TEMPORARY_PATH.get(relative, set())
    found = [call for call in writing_calls(ast.parse(path.read_text())) if call[2] not in allowed]
    assert found == []


def test_the_search_finds_calls_that_write():
    lines = ["p.write_text('a')", "open(p, 'wb')", "torch.save(1, p)", "g(lambda q: q.write_text('a'))", "open(p)"]
    code = "\n    ".join(["def f(p):", *lines])
    assert [name for _, name, _ in writing_calls(ast.parse(code))] == ["p.write_text", "open", "torch.save"]
