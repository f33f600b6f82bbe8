"""Files that transformers writes: a configuration, and weights in one file or in several.

Nothing in them is executed, and nothing takes more memory than the files are large.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from perceiver_core.checkpoints import hub
from perceiver_core.checkpoints.state import TensorSpecs, specs_in, tensor_specs

CONFIG, WEIGHTS, BINARY = "config.json", "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
LARGEST_CONFIG, LARGEST_INDEX = 2**20, 2**24


class Weights(NamedTuple):
    """Weights in a folder: what they are, and how to get them.

    Args:
        path: the file that holds them, or that says which files do.
        kinds: the shape and dtype of each, by name.
        read: gives them all.
    """

    path: Path
    kinds: TensorSpecs
    read: Callable[[], dict[str, Tensor]]


def fetched(name_or_folder: str | PathLike[str]) -> Path:
    """A folder as it is, or one fetched from the hub: what PyTorch pickled only where there are no safetensors.

    Raises:
        FileNotFoundError: no such folder, and no name on the hub, or no huggingface_hub.

    Example:
        >>> from perceiver_core.checkpoints import files
        >>> files.fetched("deepmind/vision-perceiver-fourier")  # doctest: +SKIP
    """
    folder = hub.fetched(name_or_folder, (CONFIG, *_patterns(WEIGHTS)))
    there = any((folder / f"{WEIGHTS}{end}").is_file() for end in ("", INDEX))
    if there or folder == Path(name_or_folder) or not (folder / CONFIG).is_file():
        return folder
    return hub.fetched(name_or_folder, (CONFIG, *_patterns(BINARY)))


def _patterns(name: str) -> tuple[str, ...]:
    """The names that weights have: in one file, or in several and an index."""
    stem, end = name.split(".")
    return name, f"{name}{INDEX}", f"{stem}-*-of-*.{end}"


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The dictionary in a file of JSON.

    Raises:
        ValueError: something else, or a file of more than `largest` bytes.
    """
    with path.open("rb") as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise ValueError(f"{path} must have at most {largest} bytes; it has more. Copy it again")
    try:
        found = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON in UTF-8: {error}. Copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dictionary; got {type(found).__name__}")
    return found


def weights_in(folder: Path) -> Weights:
    """The weights in a folder that transformers wrote, safetensors if there are any.

    Raises:
        FileNotFoundError: there are none, or a file that an index names is not there.
        ValueError: a file that is not whole or holds anything but tensors, an index that does not fit its files.
    """
    for name, opened in ((WEIGHTS, _of_safetensors), (BINARY, _of_binary)):
        if (folder / name).is_file():
            return opened(folder / name)
        if (folder / f"{name}{INDEX}").is_file():
            return _of_shards(folder / f"{name}{INDEX}", name.rpartition(".")[2], opened)
    raise FileNotFoundError(
        f"{folder} must hold {WEIGHTS} or {BINARY}, or the {INDEX[1:]} of one of them; there is none"
    )


def _of_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            kinds = specs_in(file)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}. Copy it again") from error
    return Weights(path, kinds, lambda: load_file(path))


def _of_binary(path: Path) -> Weights:
    size = path.stat().st_size
    try:
        _check_archive(path, size)
        found = torch.load(path, map_location="cpu", weights_only=True)  # tensors, and nothing that executes
    except Exception as error:  # of many kinds, pickle's own among them; PyTorch's advise to execute what is there
        raise ValueError(
            f"{path} is not a whole file of tensors alone ({type(error).__name__}), so it was not read. Copy it again, "
            f"or have whoever wrote it write {WEIGHTS}"
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} must hold a dictionary of tensors by name; got {type(found).__name__}")
    for name, value in found.items():
        if trouble := _trouble(value, size):
            raise ValueError(f"{path} must hold dense tensors with their values; {name} {trouble}")
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > size:
        raise ValueError(f"{path} holds tensors that share values, and is smaller than they are; write each on its own")
    return Weights(path, tensor_specs(dict(found)), lambda: dict(found))


def _check_archive(path: Path, size: int) -> None:
    """Raises ValueError for a zip file of more than it takes on disk."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("PyTorch compresses nothing")


def _trouble(value: Any, size: int) -> str:
    """Why something in a file of that size is no tensor that it holds all of; empty if it is one."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"is a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"has the layout {value.layout}" if not value.is_quantized else "is quantized"
    if value.device.type != "cpu":
        return f"is on the device {value.device}"
    dense = value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))
    if not dense or value.untyped_storage().nbytes() > size:
        return f"has strides {value.stride()} for its shape {tuple(value.shape)}, in a file of {size} bytes"
    return ""


def _of_shards(index: Path, end: str, opened: Callable[[Path], Weights]) -> Weights:
    """Weights in several files, of which an index says what each holds."""
    told = read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(file, str) for file in told.values()):
        raise ValueError(f"{index} must hold a weight_map from each tensor's name to its file's")
    files = sorted(set(told.values()))
    for file in files:
        if not file.endswith(f".{end}") or file.startswith(".") or any(mark in file for mark in "/\\:\0"):
            raise ValueError(f"{index} must name files beside it that end in .{end}; got {file!r:.80}")
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there; copy all files of the folder")
    shards = {file: opened(index.parent / file) for file in files}
    for file, shard in shards.items():
        wanted = {name for name, place in told.items() if place == file}
        if missing := sorted(wanted - shard.kinds.keys()):
            raise ValueError(f"{shard.path} must hold what {index.name} says; it lacks {missing[:5]}")
        if more := sorted(shard.kinds.keys() - wanted):
            raise ValueError(f"{shard.path} must hold what {index.name} says; it also holds {more[:5]}")
    kinds = {name: kind for shard in shards.values() for name, kind in shard.kinds.items()}
    return Weights(index, kinds, lambda: {k: v for shard in shards.values() for k, v in shard.read().items()})
