"""Files of NumPy's that are damaged, or say more than they hold: refused by their headers."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_core.interop import load_haiku
from perceiver_core.interop.weight_files import npz, zip_archive

NAME = "embed/embeddings"


def header(shape: str, descr: Any, *, version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text


def zipped(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)


def member(shape: str, descr: Any, data: bytes = b"", **told: Any) -> Callable[[Path], None]:
    return lambda path: zipped(path, (f"{NAME}.npy", header(shape, descr, **told) + data))


def bomb(path: Path) -> None:
    zipped(path, (f"{NAME}.npy", header("(20000000,)", "|u1") + bytes(20_000_000)))


def cut(path: Path) -> None:
    np.savez(path, **{NAME: np.ones(300)})
    path.write_bytes(path.read_bytes()[:-200])


def overwritten(path: Path) -> None:
    np.savez(path, **{NAME: np.ones((300, 500), np.float32)})
    data = path.read_bytes()
    at = len(data) // 2
    path.write_bytes(data[:at] + b"xxxx" + data[at + 4 :])


def array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def twice(path: Path) -> None:
    one = f"{NAME}.npy", header("(1,)", "<f4") + bytes(4)
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(path, one, one)


def objects(path: Path) -> None:
    np.savez(path, **{NAME: np.array([{}], dtype=object)})


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, "is not a complete .npz file"),
    "empty": (lambda path: path.write_bytes(b"") and None, "it has 0"),
    "no arrays": (lambda path: np.savez(path), "it lacks"),
    "the start alone": (lambda path: path.write_bytes(b"PK\x03\x04") and None, "is not a complete .npz file"),
    "a single array": (array, r"holds a single array; give an .npz of all"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04]\x94.") and None, "must hold a dictionary"),
    "something else": (lambda path: zipped(path, ("a/data.pkl", b"x")), "it holds a/data.pkl, which is no array"),
    "another compression": (
        lambda path: zipped(path, ("a.npy", header("(1,)", "<f4") + bytes(4)), compression=zipfile.ZIP_LZMA),
        "as numpy.savez writes them",
    ),
    "a name without end": (lambda path: zipped(path, ("a" * 2000 + ".npy", b"x")), "as numpy.savez writes them"),
    "no header": (lambda path: zipped(path, ("a.npy", b"x")), "not a complete .npz file"),
    "a header that is none": (
        lambda path: zipped(path, ("a.npy", header("(1,)", "<f4").replace(b"{", b"("))),
        "complete",
    ),
    "a header that executes": (member("print(3)", "<f4"), "complete .npz file"),
    "a header nested deep": (member("(" + "-" * 9000 + "1,)", "<f4"), "complete .npz file"),
    "a header of another version": (member("(1,)", "<f4", bytes(4), version=b"\x02\x00"), "version 1.0"),
    "2e12 values": (member("(2000000000000,)", "<f8", b"abc"), "whole numbers"),
    "3e8 values": (member("(300000000,)", "<f8", b"abc"), "has 131 bytes; its shape .* take 2400000128"),
    "a bomb": (bomb, "more than 16 times the"),
    "less than nothing": (member("(-3,)", "|u1", b"abc"), "none of them negative"),
    "text": (member("(1,)", "<U1", b"abcd"), f"{NAME}.npy: only arrays of numbers are read; one is of dtype '<U1'"),
    "fields": (member("(1,)", [("a", "<f8")], b"abcdabcd"), r"only arrays of numbers .* '\|V8'"),
    "objects": (objects, r"only arrays of numbers .* '\|O'"),
    "whole numbers": (member("(3, 5)", "<i4", bytes(60)), "a floating point dtype"),
    "twice": (twice, f"it holds {NAME}.npy twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_takes_no_memory(case: str, tmp_path: Path) -> None:
    write, message = WRONG[case]
    write(tmp_path / "it.npz")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"it\.npz.*{message}") as caught:
            load_haiku(tmp_path / "it.npz")
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert "allow_pickle" not in str(caught.value)


def test_long_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "it.npz", **{f"{i}": np.ones(1) for i in range(30)})
    monkeypatch.setattr(zip_archive, "LARGEST_DIRECTORY", 1000)
    with pytest.raises(ValueError, match=r"it\.npz .*: its directory, or a piece of it, has 1\d+ bytes"):
        load_haiku(tmp_path / "it.npz")


def test_damage_is_found_when_an_array_is_read(tmp_path: Path) -> None:
    overwritten(tmp_path / "it.npz")
    with (
        npz.open_npz(tmp_path / "it.npz") as arrays,
        pytest.raises(ValueError, match=r"it\.npz is not a complete .npz file.*CRC"),
    ):
        arrays[NAME].read()


def test_arrays_are_read(tmp_path: Path) -> None:
    whole = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.ones((), ">f4"),
        "c": np.asfortranarray(np.eye(3, 5)),
        "d": np.ones(0),
    }
    np.savez_compressed(tmp_path / "it.npz", **whole)
    with npz.open_npz(tmp_path / "it.npz") as arrays:
        for name, wanted in whole.items():
            np.testing.assert_array_equal(arrays[name].read(), wanted)
            assert arrays[name].shape == wanted.shape and arrays[name].dtype == wanted.dtype
