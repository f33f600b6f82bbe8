"""The cache folder of the compiled library: only complete files that only the user can change are loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from perceiver_core.kernels.grid import GridFallbackWarning, cpp_cache, cpp_library
from tests.kernels.grid.compiled import file_names, is_loaded, needs_compiler

pytestmark = needs_compiler


def reload() -> bool:
    cpp_library.functions.cache_clear()
    return is_loaded()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("inside")


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def change(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(edit(path.read_bytes())) and None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "truncated to a page": lambda path: os.truncate(path, 4096),
    "one byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": change(lambda data: data + b"\0"),
    "flipped bit": change(lambda data: data[:50_000] + bytes([data[50_000] ^ 1]) + data[50_001:]),
    "zeros": change(lambda data: bytes(len(data))),
    "text": lambda path: path.write_text("not a library"),
    "directory": replace_by_directory,
    "link": replace_by_link,
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "pipe": replace_by_pipe,
    "not readable as a library": lambda path: shutil.copy(__file__, path),
    "too large": lambda path: os.truncate(path, cpp_cache.MAX_BYTES + 1),
    "writable by the group": lambda path: path.chmod(0o660),
    "writable by all": lambda path: path.chmod(0o606),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("copies")
def test_a_damaged_library_is_compiled_again_and_replaced(
    damage: str, cache: Path, compilations: list[list[str]]
) -> None:
    """Also while the library is in use: it was loaded from memory."""
    assert is_loaded()
    (stored,) = cache.glob("*.so")
    content = stored.read_bytes()
    DAMAGES[damage](stored)
    assert reload() and len(compilations) == 2
    assert stored.is_file() and not stored.is_symlink() and stored.read_bytes() == content
    assert stored.stat().st_mode & 0o777 == 0o600
    assert reload() and len(compilations) == 2


@pytest.mark.usefixtures("copies")
def test_a_library_of_another_user_is_replaced(
    cache: Path, compilations: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_loaded()
    (stored,) = cache.glob("*.so")
    original, inode, other = os.fstat, stored.stat().st_ino, os.getuid() + 1

    def changed(handle: int) -> os.stat_result:
        status = original(handle)
        return os.stat_result((*status[:4], other, *status[5:])) if status.st_ino == inode else status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", changed)
        assert reload() and len(compilations) == 2
    assert reload() and len(compilations) == 2 and file_names(cache) == ["library"]


@pytest.mark.usefixtures("copies")
def test_a_foreign_library_with_a_fitting_digest_is_not_used(cache: Path, compilations: list[list[str]]) -> None:
    """It lacks the functions, or has another version of them."""
    assert is_loaded()
    (stored,) = cache.glob("*.so")
    name = stored.stem.rpartition("-")[0]
    for path in Path("/proc/self/maps").read_text().split() if Path("/proc/self/maps").exists() else ():
        if path.endswith(".so.6") and "libm" in path:
            stored.unlink()
            cpp_cache.store(cache, name, Path(path).read_bytes())
            assert reload() and len(compilations) == 2
            return
    pytest.skip("no other library is known")


def test_files_with_other_names_are_kept(cache: Path, copies: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    (cache / "read_grid-0123.so").write_text("of an older version")
    (cache / "notes").write_text("of the user")
    assert copies.exists() and is_loaded()
    assert file_names(cache) == ["library", "library", "notes"]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707], ids=oct)
@pytest.mark.usefixtures("copies")
def test_a_folder_that_others_can_write_to_is_not_used(
    mode: int, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its files are neither loaded nor replaced; the library is compiled for this process alone."""
    assert is_loaded()
    (planted,) = cache.iterdir()
    planted.write_bytes(b"not to be run")
    cache.chmod(mode)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert cpp_cache.cache_folder() is None and reload()
    assert planted.read_bytes() == b"not to be run" and list(scratch.iterdir()) == []


@pytest.mark.usefixtures("copies")
def test_a_folder_that_cannot_be_created_is_not_needed(cache: Path, compilations: list[list[str]]) -> None:
    cache.parent.write_text("a file instead of the folder")
    assert cpp_cache.cache_folder() is None and is_loaded() and len(compilations) == 1


def test_a_folder_of_another_user_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp_cache.cache_folder() == cache
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert cpp_cache.cache_folder() is None


@pytest.mark.usefixtures("copies")
def test_a_folder_that_is_full_is_not_needed(
    cache: Path, compilations: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(files: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpp_cache, "write_atomically", refuse)
    assert is_loaded() and file_names(cache) == [] and len(compilations) == 1


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("problem", ["missing", "full"])
def test_a_folder_for_temporary_files_that_cannot_be_used_is_replaced_by_the_cache_folder(
    problem: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if problem == "full":
        temporary.mkdir()
        original = Path.write_bytes

        def write_bytes(path: Path, data: bytes) -> int:
            if temporary in path.parents:
                raise OSError(28, "No space left on device")
            return original(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert is_loaded() and file_names(cache) == ["library"]
    assert problem == "missing" or list(temporary.iterdir()) == []


def test_without_any_folder_for_temporary_files_a_warning_says_so(
    copies: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.parent.write_text("a file instead of the folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.warns(GridFallbackWarning, match="no folder for temporary files is writable"):
        assert copies.exists() and not is_loaded()


@pytest.mark.usefixtures("copies")
def test_without_memory_files_the_library_is_loaded_from_its_path(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert is_loaded() and file_names(cache) == ["library"]
    loaded: list[str] = []
    original = cpp_library.ctypes.CDLL
    monkeypatch.setattr(cpp_library.ctypes, "CDLL", lambda path: (loaded.append(path), original(path))[1])
    assert reload() and loaded == [str(path) for path in cache.glob("*.so")]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077], ids=oct)
@pytest.mark.usefixtures("copies")
def test_the_umask_has_no_effect(umask: int, cache: Path, compilations: list[list[str]]) -> None:
    before = os.umask(umask)
    try:
        assert is_loaded() and reload() and len(compilations) == 1
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in cache.glob("*.so")] == [0o600]


def test_a_relative_folder_in_the_variable_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The XDG specification says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cpp_cache.cache_folder() == tmp_path / ".cache" / "perceiver-core"


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.home` raises RuntimeError in containers whose user has a number but no entry."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert cpp_cache.cache_folder() is None
