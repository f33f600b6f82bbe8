"""Files are written completely or not at all, whatever fails."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from perceiver_core.atomic_files import make_folder, staged, write_atomically
from tests.checkpoints.folders import contents

pytestmark = pytest.mark.no_shape_checks


@pytest.mark.parametrize(
    "content", ["größe\n", b"gr\xc3\xb6\xc3\x9fe\n", lambda path: path.write_text("größe\n", encoding="utf-8")]
)
def test_text_bytes_and_functions(content, tmp_path):
    (tmp_path / "file").write_text("old")
    write_atomically({tmp_path / "file": content})
    assert contents(tmp_path) == {"file": b"gr\xc3\xb6\xc3\x9fe\n"}


def test_all_files_are_complete_before_the_first_is_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_atomically({tmp_path / "a": "new", tmp_path / "b": lambda path: 1 / 0})
    assert contents(tmp_path) == {"a": b"old"}


def test_files_and_renames_are_flushed_in_order(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(new.name) or replace(old, new))
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))[:3])
    )
    write_atomically({tmp_path / "a.x": "1", tmp_path / "b.x": "2"})
    folder = tmp_path.name[:3]
    assert calls == ["a.x", "b.x", "a.x", folder, "b.x", folder]
    assert fsync is not os.fsync


def test_temporary_files_can_be_replaced_by_the_writer(tmp_path):
    """save_file renames a file of its own, which only its owner may read."""
    umask = os.umask(0o022)
    try:
        write_atomically({tmp_path / "x.safetensors": lambda path: save_file({"a": torch.zeros(3)}, path)})
    finally:
        os.umask(umask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_staged_files_that_are_not_renamed_are_removed(tmp_path):
    with staged({tmp_path / "a": "1"}) as paths:
        assert paths[tmp_path / "a"].read_text() == "1"
    assert contents(tmp_path) == {}


@pytest.mark.refusal
@pytest.mark.parametrize(
    "number, kind, advice",
    [
        (errno.ENOSPC, OSError, "Free space on the disk"),
        (errno.EDQUOT, OSError, "Free space in your quota"),
        (errno.EROFS, OSError, "Choose a folder on a file system that is writable"),
        (errno.EACCES, PermissionError, "Choose a folder that you may write to"),
    ],
)
@pytest.mark.parametrize("where", ["touch", "write", "flush"])
def test_errors_of_the_system_say_how_to_go_on(number, kind, advice, where, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "name of a temporary file")

    if where == "touch":
        monkeypatch.setattr(Path, "touch", fail)
    elif where == "flush":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=f"file was not written, and existing files are unchanged. {advice}") as caught:
        write_atomically({tmp_path / "file": fail if where == "write" else "new"})
    assert caught.value.errno == number
    assert os.strerror(number) in str(caught.value)
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.refusal
def test_an_error_of_a_library_on_a_full_disk_names_the_disk(tmp_path):
    """torch.save raises a RuntimeError that does not say why. A limit of the file size stands for the disk."""
    (tmp_path / "file").write_text("old")
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old_limit[1]))
    try:
        with pytest.raises(OSError, match=r"existing files are unchanged\. Raise the limit"):
            write_atomically({tmp_path / "file": lambda path: torch.save(torch.zeros(10**5), path)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.refusal
def test_an_error_of_the_writer_is_raised_as_it_is(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        write_atomically({tmp_path / "file": lambda path: {}["mine"]})
    assert contents(tmp_path) == {}


@pytest.mark.refusal
def test_a_folder_that_cannot_be_created_says_how_to_go_on(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    make_folder(tmp_path / "a" / "b")
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OSError, match=r"c was not written, .* Choose a folder on a file system that is writable"):
        make_folder(tmp_path / "c")


@pytest.mark.refusal
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_only_regular_files_are_replaced(make, tmp_path):
    make(tmp_path / "a")
    before = (tmp_path / "a").stat().st_ino
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("a", "b"):
        with pytest.raises(OSError, match=f"{name} is not a regular file, such as a folder, pipe or device"):
            write_atomically({tmp_path / name: "x"})
    assert (tmp_path / "a").stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.refusal
def test_a_reason_is_not_hidden_by_an_error_while_temporary_files_are_removed(tmp_path, monkeypatch):
    """On a read-only file system, the removal of a missing file fails as well."""

    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "temporary")

    monkeypatch.setattr(Path, "touch", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match="file was not written, and existing files are unchanged"):
        write_atomically({tmp_path / "file": "x"})
