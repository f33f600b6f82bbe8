"""A model as a folder: weights in `model.safetensors`, the constructor calls that made it in `config.json`.

Loading builds registered parts only, on no device, and compares their shapes with the file before any
memory is taken: a small hostile file can ask for nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from perceiver_core import registry

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_LARGEST_CONFIG = 4 * 2**20
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes a model to a folder, which is made if it is not there. Each file is replaced in one step.

    Args:
        model: made of registered parts (all of the library's are).
        folder: where to.

    Returns:
        The folder.

    Raises:
        ValueError: a part that is not registered, or a model changed since it was built so that its
            constructor calls no longer describe it. Nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> import perceiver_core as pc
        >>> encoder = pc.Encoder(10, latents=7, dim=32, depth=1, heads=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = pc.load(pc.save(encoder, folder))
        >>> torch.equal(again.latents, encoder.latents)
        True
    """
    folder = Path(folder)
    config = {"library": "perceiver_core", "format": FORMAT, "model": registry.describe(model)}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    different = _differences(_shapes(_build(config["model"], len(tensors))), found)
    if different:
        raise ValueError(
            f"{type(model).__name__} is no longer what its constructor made: {different}. "
            "Replace whole parts (model.head = ...), or register a part that makes this"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    return folder


def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """Builds a model from a folder that `save` wrote, in evaluation mode.

    Executes nothing from the files: only registered parts are built, see `register`.

    Args:
        folder: where from.
        device: where to.

    Raises:
        FileNotFoundError: no such folder, or a file missing in it.
        ValueError: files that are truncated, of another or newer format, name parts that are not
            registered, or do not fit each other.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there; give load the folder that save wrote")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (tuple(s.get_shape()), _dtype(s.get_dtype())) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}. Copy it again") from error
    model = _build(_read_config(folder / CONFIG), len(found))
    different = _differences(_shapes(model), found)
    if different:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {different}")
    with safe_open(folder / WEIGHTS, framework="pt", device=str(device)) as file:
        model.load_state_dict({name: file.get_tensor(name) for name in found}, assign=True)
    return model.eval()


def _read_config(path: Path) -> Any:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path} is larger than any configuration ({_LARGEST_CONFIG} bytes)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("library") != "perceiver_core" or "model" not in config:
        raise ValueError(f"{path} was not written by perceiver_core.save")
    written = config.get("format")
    if written != FORMAT:
        raise ValueError(
            f"{path} has format {written!r}; this version reads {FORMAT}. "
            "Update perceiver-core if the file is newer, or save it again with the version that wrote it"
        )
    return config["model"]


def _build(description: Any, tensors: int) -> nn.Module:
    """The model on the meta device, where nothing takes memory."""
    try:
        # No part has more sub-parts than this a tensor; one without tensors (an activation) is rare.
        with torch.device("meta"), registry.at_most(8 * tensors + 64):
            model = registry.build(description)
    except (RecursionError, OverflowError, MemoryError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG} describes no model that can be built: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{CONFIG} describes a {type(model).__name__}, not a module")
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """What does not fit, in a line; empty if all does. Floating point types may differ (half precision weights)."""
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    others = [
        f"{name} has shape {found[name][0]} {found[name][1]}, not {wanted[name][0]} {wanted[name][1]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name][0] != found[name][0]
        or (wanted[name][1] != found[name][1] and not wanted[name][1].is_floating_point)
        or found[name][1].is_floating_point != wanted[name][1].is_floating_point
    ]
    parts = [f"missing {missing[:5]}"] * bool(missing) + [f"unknown {unknown[:5]}"] * bool(unknown) + others[:5]
    return "; ".join(parts)


def _dtype(name: str) -> torch.dtype:
    if name not in _TORCH_NAMES:
        raise ValueError(f"{WEIGHTS} holds values of type {name}, which no part has")
    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
