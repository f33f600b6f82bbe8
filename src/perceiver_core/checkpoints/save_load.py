"""Saving models to folders and loading them.

`load` builds the model from its configuration on the meta device, from registered classes only. It compares all shapes
with the weights file before allocating memory, so that a small malicious file cannot cause a huge allocation. Before
writing any files, `save` builds the model from its configuration in the same way and compares it with the original.
Therefore, every saved model can be loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from perceiver_core import registry
from perceiver_core.atomic_files import make_folder
from perceiver_core.checkpoints.bound_files import read_pair, write_pair
from perceiver_core.checkpoints.folder import CONFIG, WEIGHTS, config_text, parse_config
from perceiver_core.checkpoints.state import (
    assign,
    check_plain_weights,
    check_values,
    model_differences,
    spec_differences,
    specs_in,
    state_tensors,
    tensor_specs,
)
from perceiver_core.error_messages import printable_errors


@printable_errors()
def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Save a model to a folder.

    The folder contains the weights (`model.safetensors`) and the constructor calls that build the model
    (`config.json`), including the SHA-256 digest of the weights file. If the folder already contains a model, it is
    replaced atomically: at any moment, and after any crash, `load` returns either the old or the new model. A tensor
    with several names (tied weights, or a module used twice) is written once. Nothing is written if the model cannot
    be saved.

    Args:
        model: Model built from registered classes (see `register`), such as all models of this library. Modules that
            were passed to a constructor may have been replaced (`model.head = ...`). Settings and inner layers must not
            have been changed. If the model is wrapped in `torch.compile`, `DataParallel` or `DistributedDataParallel`,
            the inner model is saved.
        folder: Folder to write, created if it does not exist.

    Returns:
        Path of the folder.

    Raises:
        ValueError: If a class is not registered, or the model has changes that its constructor calls do not describe.
        ValueError: If a tensor has no values (for example, on the meta device), or distinct tensors share memory. Tied
            weights must be the same nn.Parameter.
        OSError: If a file cannot be written, for example because the disk is full. Existing files are unchanged.

    Example:
        >>> import tempfile, torch
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = pc.load(pc.save(encoder, folder))
        >>> torch.equal(again.latents, encoder.latents)
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model, folder = unwrapped(model), path_of("folder", folder)
    for path, module in model.named_modules():
        if _is_compiled(module):
            raise ValueError(
                f"{path} is wrapped by torch.compile, which changes the names of its weights. Compile it in place with "
                "its method compile(), or put the module inside, its attribute _orig_mod, back in its place"
            )
    check_plain_weights(model)
    tensors = state_tensors(model)  # checked first: wrappers of tensors, such as fully_shard, may also change classes
    config = registry.to_config(model)
    text = config_text(config, digest="0" * 64)  # the digest is not known yet
    read_back, _ = parse_config(text, f"the {CONFIG} of {type(model).__name__}")
    built = _build_without_values(read_back, len(tensors))
    different = model_differences(built, model)
    different = different or spec_differences(tensor_specs(state_tensors(built)), tensor_specs(tensors))
    if different:
        raise ValueError(
            f"{type(model).__name__} is no longer as its constructor built it: {different}. "
            "Replace whole parts (model.head = ...), or register a part whose constructor makes this"
        )
    check_values(tensors)
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    make_folder(folder)
    write_pair(
        folder / WEIGHTS,
        lambda path: save_file(values, path, metadata={"format": "pt"}),
        folder / CONFIG,
        lambda digest: config_text(config, digest),
    )
    return folder


def path_of(name: str, path: str | os.PathLike[str]) -> Path:
    """Check that an argument can be a path, and return it. `name` is its name in error messages."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name} must be a path, a string or a pathlib.Path; got {path!r:.80}")
    if "\0" in os.fspath(path):
        raise ValueError(f"{name} must be a path without null characters; got {path!r:.80}")
    return Path(path)


def _available(device: str | torch.device) -> torch.device:
    """Check that a device exists on this machine, and return it."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be a device of this machine, such as 'cpu'; got {device!r:.80}: {reason}"
        ) from error
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and data-parallel wrappers, or `model` itself if it has no wrapper."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if _is_compiled(model) else model  # type: ignore[arg-type]


def _is_compiled(module: nn.Module) -> bool:
    # The class is compared by name, because importing it would load the compiler.
    return type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module)


@printable_errors()
def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a model from a folder written by `save`, in evaluation mode.

    No code in the files is executed, and only registered classes are instantiated (see `register`). The weights keep
    their saved dtype.

    Args:
        folder: Folder written by `save`.
        device: Device to load the weights to.

    Returns:
        Model of the class that was saved.

    Raises:
        FileNotFoundError: If the folder or one of its files does not exist.
        ValueError: If the device does not exist.
        ValueError: If a file is damaged or has a different format version, or the two files are from different saves.
        ValueError: If a class is not registered, or the configuration and the weights do not match.

    Example:
        >>> import tempfile, torch
        >>> audio = pc.adapters.Audio(patch_size=4, positions=None)
        >>> model = pc.Perceiver(audio, pc.Encoder(audio.dim, num_latents=3, dim=8), pc.heads.Identity())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = pc.load(pc.save(model, folder))
        >>> again(torch.zeros(2, 99)).shape
        torch.Size([2, 3, 8])
    """
    folder, device = path_of("folder", folder), _available(device)
    return read_pair(
        folder / WEIGHTS,
        folder / CONFIG,
        lambda text: parse_config(text, f"{folder / CONFIG}"),
        lambda config, weights: _load(config, folder / CONFIG, weights, device),
    )


def _load(config: registry.Json, source: Path, weights: Path, device: torch.device) -> nn.Module:
    """Build a model from its configuration in the file `source`, in evaluation mode, and load its weights."""
    try:
        with safe_open(weights, framework="pt") as file:
            specs = specs_in(file)
            try:
                model = _build_without_values(config, len(specs))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            different = spec_differences(tensor_specs(state_tensors(model)), specs)
            if different:
                raise ValueError(f"{weights} does not fit {CONFIG}: {different}. Copy both from one save")
            # Copied, because these tensors are views of the file, which may be overwritten.
            assign(model, {name: file.get_tensor(name).to(device, copy=True) for name in specs})
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a complete safetensors file: {error}. Copy it again") from error
    if len(dtypes := {parameter.dtype for parameter in model.parameters()}) == 1:
        model.to(dtypes.pop())  # for modules that have no weights but follow the dtype, such as `adapters.OneHotLabel`
    return model.eval()


def _build_without_values(config: registry.Json, tensors: int) -> nn.Module:
    """Build a model on the meta device, without allocating memory for its tensors.

    Args:
        config: Configuration of the model.
        tensors: Number of saved tensors. It determines the maximum number of modules.

    Raises:
        ValueError: If the configuration does not describe a module, or has too many modules for `tensors` tensors.
        ValueError: If the model has a tensor that is not in its state dict.
    """
    # Blocks have fewer modules than tensors. Modules without tensors, such as activations, are few.
    with torch.device("meta"), registry.at_most(8 * tensors + 1024):
        model = registry.from_config(config)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{CONFIG} describes a {type(model).__name__}, not a module; give save a model")
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for path, module in model.named_modules():
        own = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
        lost = [name for name, tensor in own.items() if id(tensor) not in saved]
        lost += [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
        if lost:
            raise ValueError(
                f"{path or 'the model'} ({type(module).__name__}) has a tensor {lost[0]!r} that is in no file. Keep it "
                f"in a buffer that is saved, self.register_buffer({lost[0]!r}, ...), or compute it in forward"
            )
    return model
