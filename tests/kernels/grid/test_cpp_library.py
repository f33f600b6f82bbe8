"""The compiled library: compiled once, loaded afterwards, and replaced by plain PyTorch without a compiler."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perceiver_core import CrossAttend, Tokens, reads
from perceiver_core.kernels.grid import GridFallbackWarning, cpp_library, read_grid
from tests.kernels.grid.compiled import COMPILER, file_names, is_loaded, needs_compiler

pytestmark = needs_compiler


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 17, 5), (2, 3, 17, 7 + 11), (2, 5, 7, 11), (2, 7, 11)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def results() -> list[Tensor]:
    leaves = inputs()
    outputs = read_grid(*leaves)
    return [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], leaves)]


def test_the_source_is_compiled_once_and_then_loaded(cache: Path, compilations: list[list[str]]) -> None:
    first = results()
    assert is_loaded() and len(compilations) == 1 and file_names(cache) == ["library"]
    assert cache.stat().st_mode & 0o777 == 0o700
    cpp_library.functions.cache_clear()
    torch.testing.assert_close(results(), first, rtol=0.0, atol=0.0)
    assert is_loaded() and len(compilations) == 1 and file_names(cache) == ["library"]


@pytest.mark.usefixtures("copies")
def test_another_source_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
