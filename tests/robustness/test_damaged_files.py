"""Damaged files raise a clear error or give the original content. `make fuzz` runs 5,000 more cases."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perceiver_core.interop import load_transformers
from perceiver_core.interop.weight_files.zip_archive import verify_archive
from tests.robustness import damaged_changes, damaged_files, damaged_sources

pytestmark = [pytest.mark.refusal, pytest.mark.no_shape_checks]
SEEDS_EACH = 25


@pytest.mark.parametrize("block", range(8))
def test_a_damaged_file_is_refused_or_read_as_it_was(block: int, tmp_path: Path) -> None:
    for seed in range(block * SEEDS_EACH, (block + 1) * SEEDS_EACH):
        (folder := tmp_path / str(seed)).mkdir()
        try:
            damaged_files.run_case(seed, folder)
        except Exception as error:
            raise AssertionError(f"damaged_files, seed {seed}: {error}") from error


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    damaged_sources.copy("transformers .bin", tmp_path)
    return tmp_path / "pytorch_model.bin"


def test_each_flipped_bit_of_the_values_in_a_binary_file_is_noticed(binary: Path) -> None:
    """A file of PyTorch has checksums, which its own reader ignores."""
    data, rng = binary.read_bytes(), random.Random(0)
    with zipfile.ZipFile(binary) as archive:
        values = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    for entry in rng.sample(values, 20):
        start = data.index(entry.filename.encode(), entry.header_offset)
        start = data.index(b"Z" * 4, start) if b"Z" * 4 in data[start : start + 100] else start
        end = data.index(b"PK\7\x08", start)
        changed = bytearray(data)
        changed[end - 1 - rng.randrange(entry.file_size)] ^= 1 << rng.randrange(8)
        binary.write_bytes(changed)
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin is not a complete file of tensors only: .* is damaged"
        ):
            load_transformers(binary.parent)


def test_binary_files_without_checksums_are_refused(binary: Path) -> None:
    weights = torch.load(binary, weights_only=True)
    torch.save(weights, binary, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"is no zip archive.*Older files have no checksums.*torch\.save\(torch\.load"):
        load_transformers(binary.parent)
    torch.save(torch.load(binary, weights_only=True), binary)  # the remedy in the message
    assert damaged_sources.is_equal(
        damaged_sources.described(load_transformers(binary.parent)), damaged_sources.base("transformers .bin").content
    )


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_prefix(path: Path) -> bytes:
    return b"#!/bin/sh\n" + path.read_bytes()


def with_comment(path: Path) -> bytes:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"of another tool"
    return path.read_bytes()


def with_two_directories(path: Path) -> bytes:
    return path.read_bytes() + path.read_bytes()[-22:]


def with_hidden_bytes(path: Path) -> bytes:
    """Insert bytes between the last entry and the directory, and correct the offset of the directory."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries(path).items():
            archive.writestr(name, content)
        archive.fp.write(b"hidden")  # type: ignore[union-attr]
        archive.start_dir += 6
    return target.getvalue()


def with_other_case(path: Path) -> bytes:
    """PyTorch looks names up without regard to case, so it might read either of two entries."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries(path).items():
            archive.writestr(name, content)
            archive.writestr(name.upper(), content)
    return target.getvalue()


def with_other_local_name(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        last = archive.infolist()[-1].header_offset
    data[last + 30] ^= 1
    return bytes(data)


def with_entries_that_overlap(path: Path) -> bytes:
    """The directory states the position of the first entry for the second one, too."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries(path).items():
            archive.writestr(name, content)
        archive.filelist[1].header_offset = 0
    return target.getvalue()


def with_an_entry_beyond_the_file(path: Path) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries(path).items():
            archive.writestr(name, content)
        archive.filelist[-1].header_offset = 2**31
    return target.getvalue()


def encrypted(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[6] |= 1
        data[archive.start_dir + 8] |= 1
    return bytes(data)


AMBIGUOUS = [
    with_prefix, with_comment, with_two_directories, with_hidden_bytes, with_other_case, with_other_local_name,
    with_entries_that_overlap, with_an_entry_beyond_the_file, encrypted,
]  # fmt: skip


@pytest.mark.parametrize("change", AMBIGUOUS)
def test_archives_that_readers_could_read_differently_are_refused(
    change: Callable[[Path], bytes], binary: Path
) -> None:
    binary.write_bytes(change(binary))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a complete file of tensors only"):
        load_transformers(binary.parent)


def test_a_checksum_that_was_changed_with_its_copy_is_noticed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as archive:
        archive.writestr("a", b"12345678")
    data = (tmp_path / "it.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "it.zip") as archive:
        old = struct.pack("<I", archive.getinfo("a").CRC)
    (tmp_path / "it.zip").write_bytes(data.replace(old, b"\1\2\3\4"))
    with pytest.raises(ValueError, match=r"a is damaged \(Bad CRC-32"):
        verify_archive(tmp_path / "it.zip")


def test_archives_of_other_writers_are_read(binary: Path) -> None:
    """Some writers store 64-bit sizes in the entries, or stream, with sizes and checksums after the data."""
    content = entries(binary)
    for streamed in (False, True):
        target = io.BytesIO()
        writer = io.BufferedWriter(damaged_changes.Unseekable(target)) if streamed else target
        with zipfile.ZipFile(writer, "w") as archive:
            for name, data in content.items():
                with archive.open(name, "w", force_zip64=not streamed) as file:
                    file.write(data)
        writer.flush()
        binary.write_bytes(target.getvalue())
        assert damaged_sources.is_equal(
            damaged_sources.described(load_transformers(binary.parent)),
            damaged_sources.base("transformers .bin").content,
        )


def test_an_index_states_the_size_of_its_shards(tmp_path: Path) -> None:
    damaged_sources.copy("transformers shards", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    size = sum(t.nbytes for file in tmp_path.glob("*.safetensors") for t in load_file(file).values())
    index.write_text(index.read_text().replace(str(size), str(size // 2)))
    with pytest.raises(ValueError, match=rf"index\.json must be of the same model .* is {size // 2} bytes, .* {size}"):
        load_transformers(tmp_path)
