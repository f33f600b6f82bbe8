"""Loading of folders that `save` wrote.

Loading builds registered parts only, on no device, and compares their shapes with the file before any memory is
taken: a small hostile file can ask for nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from perceiver_core import registry
from perceiver_core.checkpoints.differences import spec_differences
from perceiver_core.checkpoints.folder import CONFIG, WEIGHTS, parse_config, read_at_most
from perceiver_core.checkpoints.state import assign, specs_in, state_tensors, tensor_specs


def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a model from a folder that `save` wrote, in evaluation mode.

    Nothing in the files is executed: only registered parts are built, see `register`. Weights keep the dtype that they
    were saved in.

    Args:
        folder: Folder to read.
        device: Device of the weights.

    Returns:
        The model, an instance of the class that was saved.

    Raises:
        FileNotFoundError: No such folder, or a file missing in it.
        ValueError: Files that are truncated, of another or newer format, name parts that are not
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
            raise FileNotFoundError(f"{folder / name} does not exist; give load the folder that save wrote")
    config = parse_config(read_at_most(folder / CONFIG), f"{folder / CONFIG}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            specs = specs_in(file)
            model = build_without_values(config, len(specs))
            different = spec_differences(tensor_specs(state_tensors(model)), specs)
            if different:
                raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {different}. Copy both from one save")
            # Copies: tensors are views of the file, which may be overwritten.
            assign(model, {name: file.get_tensor(name).to(device, copy=True) for name in specs})
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}. Copy it again") from error
    return model.eval()


def build_without_values(config: registry.Json, tensors: int) -> nn.Module:
    """Build a model on the meta device, without memory; the number of tensors limits the number of modules.

    Raises:
        ValueError: A configuration of anything but a module, too many modules, or a tensor outside of the state.
    """
    # A block has fewer modules than tensors; adapters, activations and dropout have no tensors, but are few.
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
