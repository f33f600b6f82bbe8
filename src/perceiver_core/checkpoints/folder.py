"""A model as a folder: weights in `model.safetensors`, the constructor calls that made it in `config.json`.

Loading builds registered parts only, on no device, and compares their shapes with the file before any
memory is taken: a small hostile file can ask for nothing. Saving does the same to what it is about to
write, so that what is saved can be loaded, and loads as what it was.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from perceiver_core import registry

# Raised when an old file would mean something else, as it does when a default of a constructor changes.
FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_LARGEST_CONFIG = 2**20
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip
Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]  # the shape and dtype of each tensor


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes a model to a folder, which is made if it is not there.

    Both files are written in full beside the old ones before either is replaced, each in one step. A
    tensor that has several names (tied weights, a part used twice) is written once.

    Args:
        model: made of registered parts (all of the library's are). Parts that were given to a constructor
            may have been replaced since (`model.head = ...`); settings and inner layers may not.
        folder: where to.

    Returns:
        The folder.

    Raises:
        ValueError: a part that is not registered, or a model changed since it was built so that its
            constructor calls no longer describe it. Nothing is written then.

    Example:
        >>> import tempfile, torch
        >>> import perceiver_core as pc
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = pc.load(pc.save(encoder, folder))
        >>> torch.equal(again.latents, encoder.latents)
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    folder = Path(folder)
    config = {"library": "perceiver_core", "format": FORMAT, "model": registry.to_config(model)}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    tensors = tensors_of(model)
    built = _build(_parse(text, f"the {CONFIG} of {type(model).__name__}"), len(tensors))
    different = changes_of(built, model) or misfits(kinds_of(tensors_of(built)), kinds_of(tensors))
    if different:
        raise ValueError(
            f"{type(model).__name__} is no longer what its constructor made: {different}. "
            "Replace whole parts (model.head = ...), or register a part whose constructor makes this"
        )
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in with_values(tensors).items()}
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, Callable[[Path], object]] = {
        folder / WEIGHTS: lambda path: save_file(values, path, metadata={"format": "pt"})
    }
    if not (folder / CONFIG).is_file() or (folder / CONFIG).read_bytes() != text.encode():
        files[folder / CONFIG] = lambda path: path.write_bytes(text.encode())
    write_all(files)
    return folder


def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """Builds a model from a folder that `save` wrote, in evaluation mode.

    Executes nothing from the files: only registered parts are built, see `register`. Weights keep the
    dtype that they were saved in.

    Args:
        folder: where from.
        device: where to.

    Raises:
        FileNotFoundError: no such folder, or a file missing in it.
        ValueError: files that are truncated, of another or newer format, name parts that are not
            registered, or do not fit each other.

    Example:
        >>> import tempfile, torch
        >>> import perceiver_core as pc
        >>> audio = pc.adapters.Audio(patch_size=4, positions=None)
        >>> model = pc.Perceiver(audio, pc.Encoder(audio.dim, num_latents=3, dim=8), pc.heads.Identity())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = pc.load(pc.save(model, folder))
        >>> again(torch.zeros(2, 99)).shape
        torch.Size([2, 3, 8])
    """
    folder, device = Path(folder), torch.device(device)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there; give load the folder that save wrote")
    if (folder / CONFIG).stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{folder / CONFIG} is larger than any configuration ({_LARGEST_CONFIG} bytes); copy it again")
    description = _parse((folder / CONFIG).read_bytes(), f"{folder / CONFIG}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (tuple(s.get_shape()), dtype_named(s.get_dtype())) for name, s in slices.items()}
            model = _build(description, len(found))
            different = misfits(kinds_of(tensors_of(model)), found)
            if different:
                raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {different}. Copy both from one save")
            # A copy: what is read is a view of the file, which somebody may overwrite.
            _fill(model, {name: file.get_tensor(name).to(device, copy=True) for name in found})
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}. Copy it again") from error
    return model.eval()


def _parse(text: str | bytes, source: str) -> Any:
    """The description of the model in the text of a configuration."""
    if len(text) > _LARGEST_CONFIG:
        raise ValueError(f"{source} is larger than any configuration ({_LARGEST_CONFIG} bytes)")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        config = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}. Copy it again") from error
    if not isinstance(config, dict) or config.get("library") != "perceiver_core" or "model" not in config:
        raise ValueError(
            f"{source} was not written by perceiver_core.save; give load a folder that was, and one of transformers to "
            "interop.load_transformers"
        )
    written = config.get("format")
    if type(written) is not int or written != FORMAT:
        raise ValueError(
            f"{source} has format {written!r:.40}; this version reads {FORMAT}. "
            "Update perceiver-core if the file is newer, or save it again with the version that wrote it"
        )
    return config["model"]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object has a key twice; its keys are {[key for key, _ in pairs][:5]}")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number:.40} is not a finite number")
    return value


def _build(description: Any, tensors: int) -> nn.Module:
    """The model on the meta device, where nothing takes memory."""
    # A block has fewer modules than tensors; adapters, activations and dropout have no tensors, but are few.
    with torch.device("meta"), registry.at_most(8 * tensors + 1024):
        model = registry.from_config(description)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{CONFIG} describes a {type(model).__name__}, not a module; give save a model")
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for path, module in model.named_modules():
        tensors_of = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
        lost = [name for name, tensor in tensors_of.items() if id(tensor) not in saved]
        lost += [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
        if lost:
            raise ValueError(
                f"{path or 'the model'} ({type(module).__name__}) has a tensor {lost[0]!r} that is in no file. Keep it "
                f"in a buffer that is saved, self.register_buffer({lost[0]!r}, ...), or compute it in forward"
            )
    return model


def _fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Puts values in the place of the tensors of a model; what was one tensor under two names stays one."""
    made: dict[str, Tensor] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, first in _first_names(model).items():
        old = tensors[name]
        if name == first:
            new = values[name]
            made[name] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        made[name] = made[first]
    model.load_state_dict(made, assign=True)


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name in the state, the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state, each under its first name."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.layout is not torch.strided:
            raise ValueError(f"{name} is not a tensor with values ({type(value).__name__}), so it cannot be saved")
    return {name: state[name] for name, first in _first_names(model).items() if name == first}


def with_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, if they have values, and no two of them the same memory."""
    ends: list[tuple[str, int, int, str]] = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, where it has no values to save")
        if tensor.numel():
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            ends.append((str(tensor.device), start, start + reach * tensor.element_size(), name))
    ends.sort()
    for (place, _, end, name), (other_place, start, _, other) in pairwise(ends):
        if place == other_place and start < end:
            raise ValueError(
                f"{name} and {other} share memory but are two tensors, so their tie would be lost. "
                "Make them one nn.Parameter in the constructor of a registered part, or copy one"
            )
    return tensors


def kinds_of(tensors: dict[str, Tensor]) -> Kinds:
    """The shape and dtype of each."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def changes_of(made: nn.Module, now: nn.Module) -> str:
    """What has been done to a model that its constructor calls do not know of, in a line; empty if nothing."""
    was = {path: registry.settings(module) for path, module in made.named_modules(remove_duplicate=False)}
    is_ = {path: registry.settings(module) for path, module in now.named_modules(remove_duplicate=False)}
    found = [
        f"{path or 'it'} is {is_.get(path, 'not there')}, not {was.get(path, 'there')}"
        for path in [*is_, *(path for path in was if path not in is_)]
        if is_.get(path) != was.get(path)
    ]
    if not found:
        was, is_ = _first_names(made), _first_names(now)
        tied = [name for name in is_ if is_[name] != was.get(name, is_[name])]
        found = [
            f"{name} and {is_[name] if is_[name] != name else was[name]} are "
            f"{'one tensor, not two' if is_[name] != name else 'two tensors, not one'}"
            for name in tied
        ]
    return "; ".join(found[:5])


def misfits(wanted: Kinds, found: Kinds) -> str:
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


def dtype_named(name: str) -> torch.dtype:
    """The dtype that safetensors calls so."""
    if name not in _TORCH_NAMES:
        raise ValueError(f"{WEIGHTS} holds values of type {name}, which no part has")
    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def write_all(files: dict[Path, Callable[[Path], object]]) -> None:
    """Writes files in full under other names, then puts each in its place; leaves none of those names behind."""
    written = {path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial"): path for path in files}
    try:
        for temporary, path in written.items():
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask says; save_file makes private files
            files[path](temporary)
            temporary.chmod(mode)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        for temporary, path in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)
