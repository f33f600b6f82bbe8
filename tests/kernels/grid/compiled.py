"""Fixtures of the compiled library: an empty cache folder, a library that is compiled once, and scripted compilers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perceiver_core.kernels.grid import cpp_cache, cpp_compiler, cpp_library

COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
needs_compiler = [
    pytest.mark.skipif(COMPILER is None, reason="no compiler"),
    pytest.mark.skipif(not hasattr(os, "getuid"), reason="no cache is kept on Windows"),
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of the library in the user's cache folder, compiled if there is none."""
    path, compiler = tmp_path_factory.mktemp("built") / "read_grid.so", [str(COMPILER)]
    stored = cpp_cache.stored(cpp_cache.cache_folder(), cpp_library._name(compiler))
    path.write_bytes(cpp_cache.read(stored[0]) if stored else cpp_library._compile(compiler, None)[0])
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

    def run(command: list[str], *arguments: object, **options: object) -> str:
        if str(cpp_library.SOURCE) in command:
            commands.append(command)
        return original(command, *arguments, **options)  # type: ignore[arg-type]

    original = cpp_compiler.run
    monkeypatch.setattr(cpp_compiler, "run", run)
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


@pytest.fixture
def copies(cache: Path, script: Callable[[str], Path], built: Path) -> Path:
    """Makes a script the compiler, with an empty `cache`, that copies the library that is compiled once."""
    return script(f'[ -z "$OUT" ] || cp {built} "$OUT"')


def is_loaded() -> bool:
    return bool(cpp_library.functions())


def file_names(folder: Path) -> list[str]:
    """Returns the names of the files in a folder; libraries are named "library"."""
    return sorted("library" if path.suffix == ".so" and path.is_file() else path.name for path in folder.iterdir())
