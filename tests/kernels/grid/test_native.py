"""The compiled kernels: made once, kept where only the user writes, and done without where there is no compiler."""

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

from perceiver_core import CrossAttend, Tokens
from perceiver_core.kernels.grid import eager, native, read_grid
from perceiver_core import reads

COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no compiler"),
    pytest.mark.skipif(not hasattr(os, "getuid"), reason="no cache is kept on Windows"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library, compiled once for all tests here that only need some."""
    path = tmp_path_factory.mktemp("built") / "structured.so"
    native._compiled(str(COMPILER), path)
    return path


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and no kernels loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(COMPILER))
    native.library.cache_clear()
    yield tmp_path / "cache" / "perceiver-core"
    native.library.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that compiled, or tried to, from here on."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if str(native.SOURCE) in command:
            commands.append(command)
        return original(command, **options)

    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a shell script the compiler; `$OUT` is what it is asked to make, empty where it only asks for macros."""

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


def loaded() -> bool:
    return native.library() is not None


def left_in(folder: Path) -> list[str]:
    """What lies in the folder, names of libraries shortened."""
    return sorted("library" if path.suffix == ".so" and path.is_file() else path.name for path in folder.iterdir())


def test_it_is_compiled_once_and_then_loaded(cache: Path, compilations: list[list[str]]) -> None:
    first = results()
    assert loaded() and len(compilations) == 1 and left_in(cache) == ["library"]
    assert cache.stat().st_mode & 0o777 == 0o700
    native.library.cache_clear()
    torch.testing.assert_close(results(), first, rtol=0.0, atol=0.0)
    assert loaded() and len(compilations) == 1 and left_in(cache) == ["library"]


def test_another_source_is_another_library(
    cache: Path, compilations: list[list[str]], built: Path, script: Callable[[str], Path], monkeypatch, tmp_path: Path
) -> None:
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    assert loaded()
    changed = shutil.copytree(native.SOURCE.parent, tmp_path / "changed")
    (changed / "grid.h").write_text((changed / "grid.h").read_text() + "// more\n")
    monkeypatch.setattr(native, "SOURCE", changed / native.SOURCE.name)
    native.library.cache_clear()
    assert loaded() and left_in(cache) == ["library"] * 2


def test_another_processor_is_another_library(cache: Path, built: Path, script: Callable[[str], Path]) -> None:
    """The compiler's macros tell."""
    for features in ("__AVX2__", "__AVX512F__"):
        script(f'[ -z "$OUT" ] && echo "#define {features} 1" || cp {built} "$OUT"')
        native.library.cache_clear()
        assert loaded()
    assert left_in(cache) == ["library"] * 2


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_one_warning_says_what_to_install_and_results_are_equal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = results()
    torch.manual_seed(0)
    block = CrossAttend(14, 13, num_heads=13).double()
    tokens = Tokens(torch.randn(2, 3, 17, 5).double(), (torch.randn(3, 1, 8).double(), torch.randn(1, 17, 8).double()))
    x = torch.randn(2, 5, 14).double()
    wanted = block(x, tokens)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    native.library.cache_clear()
    with pytest.warns(
        RuntimeWarning, match=r"C\+\+17 compiler .*no C\+\+ compiler found.*(?s:.)*apt install g\+\+"
    ) as told:
        assert not native.available()
        found = results()
        for path in (reads.Auto(), reads.Structured()):
            reads.set_strategy(block, path)
            torch.testing.assert_close(block(x, tokens), wanted)
    assert len(told) == 1
    torch.testing.assert_close(found, expected)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    cache: Path, compilations: list[list[str]], script: Callable[[str], Path]
) -> None:
    script('[ -z "$OUT" ] || { echo half a library >"$OUT"; echo "no such instruction: frobnicate" >&2; exit 1; }')
    with pytest.warns(RuntimeWarning, match=r"could not compile reads\.cpp:\nno such instruction: frobnicate"):
        assert not loaded()
    assert left_in(cache) == [] and len(compilations) == len(native.VARIANTS)
    assert [x.shape for x in results()[:3]] == [(2, 3, 17, 5), (2, 3, 17, 18), (2, 3, 17)]
    assert len(compilations) == len(native.VARIANTS)  # it is not tried again


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nonexistent", ""])
def test_a_variable_that_names_no_compiler_is_passed_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", name)
    assert native._compiler() == COMPILER


@pytest.mark.usefixtures("cache")
def test_the_variable_comes_first(script: Callable[[str], Path]) -> None:
    own = script("exit 1")
    assert native._compiler() == str(own)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707], ids=oct)
def test_a_folder_that_others_may_write_to_is_not_used(
    mode: int, cache: Path, built: Path, script: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What lies there is neither loaded nor replaced; the library is made for this process alone."""
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    assert loaded()
    (planted,) = cache.iterdir()
    planted.unlink()  # it is loaded, so another file takes its name
    planted.write_bytes(b"not to be run")
    cache.chmod(mode)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    native.library.cache_clear()
    assert native._folder() is None and loaded()
    assert planted.read_bytes() == b"not to be run" and list(scratch.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_done_without(
    cache: Path, built: Path, script: Callable[[str], Path], compilations: list[list[str]]
) -> None:
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    cache.parent.write_text("a file where the folder would be")
    assert native._folder() is None and loaded() and len(compilations) == 1


@pytest.mark.parametrize("why", ["not writable", "another's"])
def test_a_folder_that_is_not_the_users_to_write_is_not_used(
    why: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native._folder() == cache
    if why == "not writable":
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    else:
        monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert native._folder() is None


def test_a_kept_library_that_cannot_be_loaded_is_passed_over(
    cache: Path, built: Path, script: Callable[[str], Path], compilations: list[list[str]]
) -> None:
    """Damaged, made on another system, or where nothing may be run."""
    script(f'[ -z "$OUT" ] || cp {built} "$OUT"')
    assert loaded()
    [kept] = cache.glob("*.so")
    kept.unlink()  # not written over: it is loaded
    kept.write_bytes(b"")
    native.library.cache_clear()
    assert loaded() and len(compilations) == 2


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number: there `Path.home` raises RuntimeError."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert native._folder() is None


READ = """
import torch
from perceiver_core.kernels.grid import native, read_grid

read = read_grid(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 5), torch.ones(1, 3, 5), torch.ones(1, 5))
assert native.library() is not None
torch.testing.assert_close(read.content, torch.ones(1, 1, 2, 3))
"""


def test_processes_at_once_all_succeed(cache: Path, built: Path, script: Callable[[str], Path], tmp_path: Path) -> None:
    """Each compiles before the other is done, in two halves, and nobody ever sees half a library."""
    wait = 'while [ $(ls "$(dirname "$0")"/*.started | wc -l) -lt 2 ]; do sleep 0.05; done'
    script(
        f'[ -z "$OUT" ] && exit; touch "$(dirname "$0")/$$.started"; head -c 9999 {built} >"$OUT"; {wait}; '
        f'cp {built} "$OUT"'
    )
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", READ]) for _ in range(2)]
    assert [process.wait(timeout=100) for process in both] == [0, 0]
    assert len(list(tmp_path.glob("*.started"))) == 2 and left_in(cache) == ["library"]


@pytest.mark.parametrize("shift", [0.0, -3000.0, 3000.0])
def test_few_queries_read_parts_of_the_grid_that_are_then_merged(shift: float) -> None:
    """Some parts have no token, one query of one sample has none at all, and scores are far from zero."""
    generator = torch.Generator().manual_seed(0)
    grid = (41, 67)
    shapes = (2, 1, 3, 2), (2, 1, 3, sum(grid)), (2, 2, *grid), (2, *grid)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    mask = torch.rand(2, *grid, generator=generator) < 0.7
    mask[0, :20], mask[1] = False, False
    mask[1, -1, -1] = shift == 0.0
    a, u, content, scale = leaves
    given = [x.detach() for x in (a, u + shift, content, scale.abs() * 0.1 + 0.5)]
    assert native._parts(2, 2, [a, u], content) > 2
    found, wanted = ([*module.forward(*given, mask)] for module in (native, eager))
    log_sums = [(base + total.log2()).double() for _, _, base, total in (found, wanted)]
    torch.testing.assert_close(log_sums[0], log_sums[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=0.0, atol=2e-5 if shift == 0.0 else 2e-3)
    assert torch.isfinite(torch.stack([x.sum() for x in found])).all()


@pytest.mark.parametrize("grid", [(3001,), (1, 3001), (41, 67), (9, 11, 31)], ids=str)
@pytest.mark.parametrize("queries", [1, 2], ids=["shared", "own"])
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "weights"])
def test_gradients_of_the_parts_of_a_grid_are_summed_up(grid: tuple[int, ...], queries: int, tokens: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    asked = (queries, 3, 17)
    shapes = (*asked, 3), (*asked, sum(grid)), (2, 3, *grid), (2, *grid)
    given = [torch.randn(shape, generator=generator).double() for shape in shapes]
    mask = torch.rand(2, *grid, generator=generator) < 0.7
    _, _, base, total = eager.forward(*given, mask)
    back = [torch.randn(2, *asked[1:], n, generator=generator).double() for n in (3, sum(grid))]
    offset = torch.randn(2, *asked[1:], generator=generator).double()
    found, wanted = (module.backward(*given, mask, base, total, *back, offset, tokens) for module in (native, eager))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_without_openmp_other_threads_give_the_same(
    cache: Path, compilations: list[list[str]], script: Callable[[str], Path]
) -> None:
    """A compiler that refuses the flag, as that of macOS does."""
    script(f'for word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done; exec {COMPILER} "$@"')
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = results()
    finally:
        torch.set_num_threads(before)
    assert loaded() and "-fopenmp" not in compilations[-1] and len(compilations) == len(native.VARIANTS) / 2 + 1
    (library,) = cache.iterdir()
    assert b"GOMP_parallel" not in library.read_bytes()
    native.library.cache_clear()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        torch.testing.assert_close(found, results())


def test_flags_that_a_compiler_does_not_know_are_left_out(
    cache: Path, compilations: list[list[str]], built: Path, script: Callable[[str], Path]
) -> None:
    script(
        'for word in "$@"; do case "$word" in -march=*|-mcpu=*) exit 1;; esac; done; '
        f'[ -z "$OUT" ] || cp {built} "$OUT"'
    )
    assert loaded() and [set(command) & {"-march=native", "-mcpu=native", "-fopenmp"} for command in compilations] == [
        {"-march=native", "-fopenmp"},
        {"-mcpu=native", "-fopenmp"},
        {"-fopenmp"},
    ]
