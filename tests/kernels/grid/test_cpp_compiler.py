"""The C++ compiler of the machine, and compilers that hang, crash or print without end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from perceiver_core.kernels.grid import GridFallbackWarning, cpp_compiler, cpp_library
from tests.kernels.grid.compiled import COMPILER, file_names, is_loaded, needs_compiler

pytestmark = needs_compiler
Script = Callable[[str], Path]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nonexistent", "", " ", '"unbalanced', "nonexistent with arguments"])
def test_a_variable_that_names_no_compiler_is_skipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", name)
    assert cpp_compiler.find_compiler() == [COMPILER]


@pytest.mark.usefixtures("cache")
def test_the_variable_has_priority_and_may_have_arguments(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script("exit 1")
    assert cpp_compiler.find_compiler() == [str(path)]
    monkeypatch.setenv("CXX", f"{path} c++ '-D A'")
    assert cpp_compiler.find_compiler() == [str(path), "c++", "-D A"]
    spaced = path.rename(path.with_name("a compiler"))
    monkeypatch.setenv("CXX", str(spaced))
    assert cpp_compiler.find_compiler() == [str(spaced)]


def test_a_compiler_behind_a_launcher_compiles(
    cache: Path, built: Path, script: Script, compilations: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = script(f'[ "$1" = real ] || exit 1; [ -z "$OUT" ] || cp {built} "$OUT"')
    monkeypatch.setenv("CXX", f"{launcher} real")
    assert is_loaded() and file_names(cache) == ["library"] and compilations[0][:2] == [str(launcher), "real"]


FAILURES = {
    "no output": ("exit 0", "No such file"),
    "an empty output": (': >"$OUT"', "file too short"),
    "garbage as output": ('head -c 9999 /dev/urandom >"$OUT"', "invalid ELF header|file too short"),
    "a directory as output": ('mkdir "$OUT"', "is not a file|directory"),
    "a pipe as output": ('mkfifo "$OUT"', "is not a file"),
    "a link that leads nowhere": ('ln -s nowhere "$OUT"', "No such file|symbolic links"),
    "no message": ("exit 3", "exit code 3 and no message"),
    "a crash": ("kill -SEGV $$", "exit code -11 and no message"),
    "control characters": ("printf 'error \\033[2J\\n' >&2; exit 1", r"error \?\[2J"),
    "bytes that are not text": ("printf 'error \\377\\n' >&2; exit 1", "error .\n"),
    "a library without the functions": (
        'echo "int f() { return 0; }" >"$OUT.cpp"; exec c++ -shared -fPIC "$OUT.cpp" -o "$OUT"',
        "incomplete: .*read_grid_version",
    ),
    "a library of another version": (
        'echo "extern \\"C\\" long read_grid_version() { return -7; }" >"$OUT.cpp"; '
        'exec c++ -shared -fPIC "$OUT.cpp" -o "$OUT"',
        "version -7 instead of",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_of_the_compiler_are_quoted_and_no_file_is_left(
    failure: str, cache: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, message = FAILURES[failure]
    script(f'[ -z "$OUT" ] && exit; {body}')
    monkeypatch.setattr(cpp_library, "VARIANTS", [[]])
    with pytest.warns(GridFallbackWarning, match=rf"could not compile reads\.cpp:(?s:.)*{message}"):
        assert not is_loaded()
    assert file_names(cache) == []


def test_a_program_that_hangs_is_killed_with_its_children(script: Script, tmp_path: Path) -> None:
    """The child holds the pipe of the output open."""
    path = script(f"sleep 600 & echo $! >{tmp_path}/child; wait")
    with pytest.raises(TimeoutError, match="compiler did not finish in 1 seconds"):
        cpp_compiler.run([str(path)], 1)
    child = int((tmp_path / "child").read_text())
    stat = Path(f"/proc/{child}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child is alive")


def test_a_compiler_that_hangs_is_tried_once(cache: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script('[ -z "$OUT" ] || sleep 600')
    original = cpp_compiler.run
    monkeypatch.setattr(cpp_compiler, "run", lambda command, timeout, **options: original(command, 1, **options))
    with pytest.warns(GridFallbackWarning, match="compiler did not finish in 1 seconds"):
        assert not is_loaded()
    assert file_names(cache) == []


def test_a_server_that_the_compiler_starts_is_not_waited_for(script: Script) -> None:
    assert cpp_compiler.run([str(script("sleep 60 & echo done"))], 30) == "done\n"  # it would fail after 30 seconds


def test_output_without_end_is_cut(script: Script) -> None:
    path = script("head -c 5000000 /dev/zero | tr '\\0' x; exit 1")
    with pytest.raises(ChildProcessError, match=r"^x{2000}$"):
        cpp_compiler.run([str(path)], 60)


def test_input_is_empty(script: Script) -> None:
    assert cpp_compiler.run([str(script("cat; echo end"))], 60) == "end\n"
