"""Saving of models to folders.

Before anything is written, the model is built again from its configuration, on the meta device, and compared with the
original, so that every saved folder can be loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from perceiver_core.checkpoints.differences import model_differences, spec_differences
from perceiver_core.checkpoints.folder import CONFIG, WEIGHTS, config_text, parse_config, write_atomically
from perceiver_core.checkpoints.loading import build_without_values
from perceiver_core.checkpoints.state import check_values, state_tensors, tensor_specs


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model to a folder, which is created if it does not exist.

    Both files are written under temporary names before either is replaced, each in one step. A tensor that has
    several names (tied weights, a part used twice) is written once.

    Args:
        model: Model of registered parts (all of the library's are). Parts that were passed to a constructor may have
            been replaced since (`model.head = ...`); settings and inner layers may not. Of a model wrapped by
            `torch.compile`, `DataParallel` or `DistributedDataParallel`, the model inside is saved.
        folder: Folder to write.

    Returns:
        The folder.

    Raises:
        ValueError: A part that is not registered, a model changed so that its constructor calls no longer describe it,
            or tensors without values. Nothing is written then.

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
    model, folder = unwrapped(model), Path(folder)
    _check_not_compiled(model)
    tensors = state_tensors(model)  # first: what wraps tensors may change classes too (fully_shard)
    text = config_text(model)
    built = build_without_values(parse_config(text, f"the {CONFIG} of {type(model).__name__}"), len(tensors))
    different = model_differences(built, model)
    different = different or spec_differences(tensor_specs(state_tensors(built)), tensor_specs(tensors))
    if different:
        raise ValueError(
            f"{type(model).__name__} is no longer as its constructor built it: {different}. "
            "Replace whole parts (model.head = ...), or register a part whose constructor makes this"
        )
    check_values(tensors)
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, Callable[[Path], object]] = {
        folder / WEIGHTS: lambda path: save_file(values, path, metadata={"format": "pt"})
    }
    if not (folder / CONFIG).is_file() or (folder / CONFIG).read_bytes() != text.encode():
        files[folder / CONFIG] = lambda path: path.write_bytes(text.encode())
    write_atomically(files)
    return folder


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of torch.compile and data parallelism."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if _is_compiled(model) else model  # type: ignore[arg-type]


def _is_compiled(module: nn.Module) -> bool:
    # By its name: importing the class would load the compiler.
    return type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module)


def _check_not_compiled(model: nn.Module) -> None:
    """Raise ValueError if a submodule is wrapped by torch.compile, which changes the names of its weights."""
    for path, module in model.named_modules():
        if _is_compiled(module):
            raise ValueError(
                f"{path} is wrapped by torch.compile, which changes the names of its weights. Compile it in place with "
                "its method compile(), or put the module inside, its attribute _orig_mod, back in its place"
            )
