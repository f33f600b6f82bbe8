"""The compiled library: compiled once, kept where only the user can write, and replaced where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perceiver_core import CrossAttend, Tokens, reads
from perceiver_core.kernels.grid import GridFallbackWarning, cpp_library, read_grid

COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no compiler"),
    pytest.mark.skipif(not hasattr(os, "getuid"), reason="no cache is kept on Windows"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Library that is compiled once for all tests here that need any."""
    path = tmp_path_factory.mktemp("built") / "read_grid.so"
    cpp_library._compile(str(COMPILER), path)
    return path


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Empty cache folder, without a library loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(COMPILER))
    cpp_library.functions.cache_clear()
    yield tmp_path / "cache" / "perceiver-core"
    cpp_library.functions.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that compile, or try to, from here on."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if str(cpp_library.SOURCE) in command:
            commands.append(command)
        return original(command, **options)

    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a shell script the compiler; `$OUT` is the output file, empty if only the macros are requested."""

    def write(body: str) -> Path:
        path = tmp_path / "compiler"
        find_out = 'OUT=; before=; for word in "$@"; do [ "$before" = -o ] && OUT="$word"; before="$word"; done'
        path.write_text(f"#!/bin/sh\n{find_out}\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return write


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 17, 5), (2, 3, 17, 7 + 11), (2, 5, 7, 11), (2, 7, 11)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def results() -> list[Tensor]:
    leaves = inputs()
    outputs = read_grid(*leaves)
    return [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], leaves)]


def is_loaded() -> bool:
    return bool(cpp_library.functions())


def file_names(folder: Path) -> list[str]:
    """Returns the names of the files in a folder; libraries are named "library"."""
    return sorted("library" if path.suffix == ".so" and path.is_file() else path.name for path in folder.iterdir())


def test_the_source_is_compiled_once_and_then_loaded(cache: Path, compilations: list[list[str]]) -> None:
    first = results()
    assert is_loaded() and len(compilations) == 1 and file_names(cache) == ["library"]
    assert cache.stat().st_mode & 0o777 == 0o700
    cpp_library.functions.cache_clear()
    torch.testing.assert_close(results(), first, rtol=0.0, atol=0.0)
    assert is_loaded() and len(compilations) == 1 and file_names(cache) == ["library"]


def test_another_source_is_another_library(
    cache: Path, compilations: list[list[str]], built: Path, script: Callable[[str], Path], monkeypatch, tmp_path: Path
) -> None:
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    assert is_loaded()
    changed = shutil.copytree(cpp_library.SOURCE.parent, tmp_path / "changed")
    (changed / "grid.h").write_text((changed / "grid.h").read_text() + "// more\n")
    monkeypatch.setattr(cpp_library, "SOURCE", changed / cpp_library.SOURCE.name)
    cpp_library.functions.cache_clear()
    assert is_loaded() and file_names(cache) == ["library"] * 2


def test_another_processor_is_another_library(cache: Path, built: Path, script: Callable[[str], Path]) -> None:
    """The compiler's macros differ."""
    for features in ("__AVX2__", "__AVX512F__"):
        script(f'[ -z "$OUT" ] && echo "#define {features} 1" || cp {built} "$OUT"')
        cpp_library.functions.cache_clear()
        assert is_loaded()
    assert file_names(cache) == ["library"] * 2


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_one_warning_names_what_to_install_and_results_are_equal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = results()
    torch.manual_seed(0)
    block = CrossAttend(14, 13, num_heads=13).double()
    tokens = Tokens(torch.randn(2, 3, 17, 5).double(), (torch.randn(3, 1, 8).double(), torch.randn(1, 17, 8).double()))
    x = torch.randn(2, 5, 14).double()
    expected_output = block(x, tokens)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    cpp_library.functions.cache_clear()
    with pytest.warns(
        GridFallbackWarning, match=r"C\+\+17 compiler .*no C\+\+ compiler found.*(?s:.)*apt install g\+\+"
    ) as warned:
        assert not cpp_library.functions()
        actual = results()
        for path in (reads.Auto(), reads.Structured()):
            reads.set_strategy(block, path)
            torch.testing.assert_close(block(x, tokens), expected_output)
    assert len(warned) == 1
    torch.testing.assert_close(actual, expected)


def test_the_message_of_a_compiler_that_fails_is_quoted_and_no_file_is_left(
    cache: Path, compilations: list[list[str]], script: Callable[[str], Path]
) -> None:
    script('[ -z "$OUT" ] || { echo half a library >"$OUT"; echo "no such instruction: frobnicate" >&2; exit 1; }')
    with pytest.warns(GridFallbackWarning, match=r"could not compile reads\.cpp:\nno such instruction: frobnicate"):
        assert not is_loaded()
    assert file_names(cache) == [] and len(compilations) == len(cpp_library.VARIANTS)
    assert [x.shape for x in results()[:3]] == [(2, 3, 17, 5), (2, 3, 17, 18), (2, 3, 17)]
    assert len(compilations) == len(cpp_library.VARIANTS)  # it is not tried again


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nonexistent", ""])
def test_a_variable_that_names_no_compiler_is_skipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", name)
    assert cpp_library._compiler() == COMPILER


@pytest.mark.usefixtures("cache")
def test_the_variable_has_priority(script: Callable[[str], Path]) -> None:
    path = script("exit 1")
    assert cpp_library._compiler() == str(path)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707], ids=oct)
def test_a_folder_that_others_can_write_to_is_not_used(
    mode: int, cache: Path, built: Path, script: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its files are neither loaded nor replaced; the library is compiled for this process alone."""
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    assert is_loaded()
    (planted,) = cache.iterdir()
    planted.unlink()  # not overwritten, because it is loaded
    planted.write_bytes(b"not to be run")
    cache.chmod(mode)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    cpp_library.functions.cache_clear()
    assert cpp_library._cache_folder() is None and is_loaded()
    assert planted.read_bytes() == b"not to be run" and list(scratch.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_not_needed(
    cache: Path, built: Path, script: Callable[[str], Path], compilations: list[list[str]]
) -> None:
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    cache.parent.write_text("a file instead of the folder")
    assert cpp_library._cache_folder() is None and is_loaded() and len(compilations) == 1


@pytest.mark.parametrize("reason", ["not writable", "another user's"])
def test_a_folder_that_the_user_does_not_own_or_cannot_write_to_is_not_used(
    reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpp_library._cache_folder() == cache
    if reason == "not writable":
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    else:
        monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert cpp_library._cache_folder() is None


def test_a_cached_library_that_cannot_be_loaded_is_recompiled(
    cache: Path, built: Path, script: Callable[[str], Path], compilations: list[list[str]]
) -> None:
    """It is damaged, of another system, or in a folder whose files may not be executed."""
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    assert is_loaded()
    [cached] = cache.glob("*.so")
    cached.unlink()  # not overwritten, because it is loaded
    cached.write_bytes(b"")
    cpp_library.functions.cache_clear()
    assert is_loaded() and len(compilations) == 2


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.home` raises RuntimeError in containers whose user has a number but no entry."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cpp_library._cache_folder() is None


READ = """
import torch
from perceiver_core.kernels.grid import cpp_library, read_grid

read = read_grid(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 5), torch.ones(1, 3, 5), torch.ones(1, 5))
assert cpp_library.functions()
torch.testing.assert_close(read.content, torch.ones(1, 1, 2, 3))
"""


def test_concurrent_processes_all_succeed(
    cache: Path, built: Path, script: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each compiles before the other is done, in two halves, and none ever loads half a library."""
    wait = 'while [ $(ls "$(dirname "$0")"/*.started | wc -l) -lt 2 ]; do sleep 0.05; done'
    script(
        f'[ -z "$OUT" ] && exit; touch "$(dirname "$0")/$$.started"; head -c 9999 {built} >"$OUT"; {wait}; '
        f'cp {built} "$OUT"'
    )
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", READ]) for _ in range(2)]
    assert [process.wait(timeout=100) for process in both] == [0, 0]
    assert len(list(tmp_path.glob("*.started"))) == 2 and file_names(cache) == ["library"]


def test_without_openmp_other_threads_give_equal_results(
    cache: Path, compilations: list[list[str]], script: Callable[[str], Path]
) -> None:
    """Some compilers do not accept the flag, like that of macOS."""
    script(f'for word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done; exec {COMPILER} "$@"')
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        actual = results()
    finally:
        torch.set_num_threads(before)
    assert is_loaded() and "-fopenmp" not in compilations[-1] and len(compilations) == len(cpp_library.VARIANTS) / 2 + 1
    (library,) = cache.iterdir()
    assert b"GOMP_parallel" not in library.read_bytes()
    cpp_library.functions.cache_clear()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_library, "functions", dict)
        torch.testing.assert_close(actual, results())


def test_flags_that_a_compiler_does_not_accept_are_omitted(
    cache: Path, compilations: list[list[str]], built: Path, script: Callable[[str], Path]
) -> None:
    script(
        'for word in "$@"; do case "$word" in -march=*|-mcpu=*) exit 1;; esac; done; '
        f'[ -z "$OUT" ] || cp {built} "$OUT"'
    )
    assert is_loaded() and [
        set(command) & {"-march=native", "-mcpu=native", "-fopenmp"} for command in compilations
    ] == [
        {"-march=native", "-fopenmp"},
        {"-mcpu=native", "-fopenmp"},
        {"-fopenmp"},
    ]
