"""Reader of state dicts that `torch.save` wrote (`.bin`, `.pt`). It executes no code and verifies all checksums."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver_core.interop.weight_files.zip_archive import BoundedFile, is_zip, open_archive, verify_checksums

_REMEDY = "Copy it again, or get a copy saved as model.safetensors"


def read_archive(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file that `torch.save` wrote in PyTorch 1.6 or newer.

    Raises:
        ValueError: If the file is damaged, contains anything but dense tensors on the CPU, or has no checksums.
        ValueError: If the tensors have more bytes than the file.
    """
    size = path.stat().st_size
    if not is_zip(path):
        raise ValueError(
            f"{path} is not a complete file of tensors only: it is no zip archive, as torch.save writes since PyTorch "
            f"1.6. Older files have no checksums, so damage would not be noticed. {_REMEDY}, or if it is that old and "
            "you trust it, write it again: torch.save(torch.load(path, weights_only=True), path)"
        )
    with BoundedFile(path) as file:
        try:
            archive = open_archive(file)
            _check_entries(archive)
            verify_checksums(archive)
            with open(file.fileno(), "rb", closefd=False) as whole:  # without the bound of `file`
                whole.seek(0)
                content = torch.load(whole, map_location="cpu", weights_only=True)  # executes no code
        except ValueError as error:
            raise ValueError(f"{path} is not a complete file of tensors only: {error}. {_REMEDY}") from error
        except Exception as error:  # of many types; PyTorch's messages are hidden, since they suggest unsafe loading
            raise ValueError(
                f"{path} is not a complete file of tensors only ({type(error).__name__}), so it was not read. {_REMEDY}"
            ) from None
    _check_content(path, content, size, Counter(entry.file_size for entry in archive.infolist()))
    return dict(content)


def _check_entries(archive: zipfile.ZipFile) -> None:
    """Check that all entries are uncompressed and have unique names, as PyTorch's reader assumes.

    It ignores case in names.
    """
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("its entries are compressed, which PyTorch does not do")
    if len({name.lower() for name in archive.namelist()}) < len(archive.namelist()):
        raise ValueError("two of its entries have the same name apart from case")


def _check_content(path: Path, content: object, size: int, entries: Counter[int]) -> None:
    """Check that a file of `size` bytes, with `entries` of these sizes, contains a state dict of dense tensors."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} must hold a dictionary of tensors by name; got {type(content).__name__}")
    for name, value in content.items():
        if problem := _problem(value, size):
            raise ValueError(f"{path} must hold dense tensors with their values; {name} {problem}")
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > size:
        raise ValueError(f"{path} is smaller than its tensors, since they share memory; save a clone of each instead")
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in content.values()}
    if Counter(storages.values()) - entries:
        raise ValueError(f"{path} contains tensors whose sizes differ from those of its entries. {_REMEDY}")


def _problem(value: object, size: int) -> str:
    """Return "" if `value` is a dense CPU tensor that fits in `size` bytes, or a description of the problem."""
    if type(value) not in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"has the layout {value.layout}" if not value.is_quantized else "is quantized"
    if value.device.type != "cpu":
        return f"is on the device {value.device}"
    dense = value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))
    if not dense or value.untyped_storage().nbytes() > size:
        return f"has strides {value.stride()} for its shape {tuple(value.shape)}, in a file of {size} bytes"
    return ""
