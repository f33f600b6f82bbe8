"""Readers of PyTorch state dicts (safetensors or `.bin`, in one file or in shards with an index) and JSON files.

No code in the files is executed. Files whose tensors have more bytes than the file itself are rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perceiver_core.checkpoints import hub
from perceiver_core.checkpoints.folder import CONFIG, LARGEST_CONFIG, WEIGHTS, parse_json, read_at_most
from perceiver_core.checkpoints.state import specs_in
from perceiver_core.interop.weight_files.torch_archive import read_archive
from perceiver_core.registry import Json

BINARY, INDEX = "pytorch_model.bin", ".index.json"
LARGEST_INDEX = 2**24  # bytes


class StateDictFile(NamedTuple):
    """Path of a state dict, the headers of its tensors, a function that reads the tensors, and its metadata."""

    path: Path  # path of the weight file, or of the index if there are shards
    headers: dict[str, Tensor]  # meta tensors with the shapes and dtypes of the weights, keyed by name
    read: Callable[[], dict[str, Tensor]]
    metadata: Mapping[str, str] = MappingProxyType({})  # of a single safetensors file


def fetch(name_or_folder: str | PathLike[str]) -> Path:
    """Return the folder of a model. If it is not a local folder, download it from the Hugging Face Hub.

    `.bin` files are downloaded only if the repository has no safetensors files.
    """
    folder = hub.fetched(name_or_folder, (CONFIG, *_patterns(WEIGHTS)))
    has_weights = any((folder / f"{WEIGHTS}{end}").is_file() for end in ("", INDEX))
    if has_weights or folder == Path(name_or_folder) or not (folder / CONFIG).is_file():
        return folder
    return hub.fetched(name_or_folder, (CONFIG, *_patterns(BINARY)))


def _patterns(name: str) -> tuple[str, ...]:
    """Return file name patterns such as model.safetensors, model.safetensors.index.json, model-*-of-*.safetensors."""
    stem, end = name.split(".")
    return name, f"{name}{INDEX}", f"{stem}-*-of-*.{end}"


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Json]:
    """Read a dictionary from a JSON file.

    Raises:
        ValueError: If the file does not contain a JSON dictionary, or if it is larger than `largest` bytes.
    """
    content = parse_json(read_at_most(path, largest), str(path), largest=largest)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary; got {type(content).__name__}")
    return content


def open_folder(folder: Path) -> StateDictFile:
    """Open the weights in a folder written by transformers. Safetensors files are preferred to `.bin` files.

    Raises:
        FileNotFoundError: If the folder contains no weights, or if a shard is missing.
        ValueError: If a file is damaged, or if the index does not match the shards.
    """
    for name, opener in ((WEIGHTS, open_safetensors), (BINARY, _open_binary)):
        if (folder / name).is_file():
            return opener(folder / name)
        if (folder / f"{name}{INDEX}").is_file():
            return _open_shards(folder / f"{name}{INDEX}", name.rpartition(".")[2], opener)
    raise FileNotFoundError(
        f"{folder} must hold {WEIGHTS} or {BINARY}, or {WEIGHTS}{INDEX} or {BINARY}{INDEX}; there is none"
    )


def open_safetensors(path: Path) -> StateDictFile:
    """Open a safetensors file and read its headers.

    Raises:
        ValueError: If the file is truncated or not in the safetensors format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            specs = specs_in(file)
            headers = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
            metadata = file.metadata() or {}
            # safetensors' save_model stores a tied tensor once; the metadata maps its other names to the stored one.
            tied = {name: kept for name, kept in metadata.items() if kept in headers}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}. Copy it again") from error
    headers |= {name: headers[kept] for name, kept in tied.items()}

    def read() -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:  # clone, because the file is memory-mapped and may be overwritten
            tensors = {name: file.get_tensor(name).clone() for name in specs}
        return tensors | {name: tensors[kept] for name, kept in tied.items()}

    return StateDictFile(path, headers, read, metadata)


def read_state_dict(source: Mapping[str, Tensor] | str | PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or return a shallow copy of a state dict.

    Args:
        source: Path of a safetensors file, or state dict.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If `source` is neither a mapping nor a path.
        ValueError: If the file is not a safetensors file, or if a value of the mapping is not a tensor.
    """
    if isinstance(source, (str, PathLike)):
        if not (path := Path(source)).is_file():
            raise FileNotFoundError(f"{path} does not exist; give the path of a safetensors file, or a state dict")
        try:
            return open_safetensors(path).read()
        except ValueError as error:
            raise ValueError(
                f"{error}. Read a file of another format yourself (a .pt file by torch.load with weights_only=True), "
                "and give its state dict"
            ) from error
    if not isinstance(source, Mapping):
        raise TypeError(f"state_dict must be one, or a path; got {type(source).__name__}. Give model.state_dict()")
    for name, value in source.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict must hold tensors alone; {name!r} is of type {type(value).__name__}")
    return dict(source)


def _open_binary(path: Path) -> StateDictFile:
    content = read_archive(path)
    headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in content.items()}
    return StateDictFile(path, headers, lambda: {name: tensor.clone() for name, tensor in content.items()})


def _open_shards(index: Path, end: str, opener: Callable[[Path], StateDictFile]) -> StateDictFile:
    """Open weights in several files (shards). `end` is their file extension, and `opener` opens one of them."""
    content = read_json(index, LARGEST_INDEX)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} must hold a weight_map from each tensor's name to its file's")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not file.endswith(f".{end}") or file.startswith(".") or any(mark in file for mark in "/\\:\0"):
            raise ValueError(f"{index} must name files beside it that end in .{end}; got {file!r:.80}")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which does not exist; copy all files of the folder")
    shards = {file: opener(index.parent / file) for file in files}
    for file, shard in shards.items():
        expected = {name for name, place in weight_map.items() if place == file}
        if missing := sorted(expected - shard.headers.keys()):
            raise ValueError(f"{shard.path} must hold what {index.name} says; it lacks {missing[:5]}")
        if unexpected := sorted(shard.headers.keys() - expected):
            raise ValueError(f"{shard.path} must hold what {index.name} says; it also holds {unexpected[:5]}")
    headers = {name: header for shard in shards.values() for name, header in shard.headers.items()}

    def read() -> dict[str, Tensor]:
        _check_total_size(index, content.get("metadata"), headers)  # last: errors that name a weight say more
        return {name: tensor for shard in shards.values() for name, tensor in shard.read().items()}

    return StateDictFile(index, headers, read)


def _check_total_size(index: Path, metadata: object, headers: Mapping[str, Tensor]) -> None:
    """Check the total size in an index, if any, against that of all tensors. Tied tensors may be counted once."""
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    each = {id(header): header.nbytes for header in headers.values()}
    sizes = sum(header.nbytes for header in headers.values()), sum(each.values())
    if isinstance(stated, (int, float)) and stated not in sizes:
        raise ValueError(
            f"{index} must be of the same model as its shards; its total_size is {stated!r:.40} bytes, but the shards "
            f"have {sizes[0]}. Copy all files from one folder"
        )
