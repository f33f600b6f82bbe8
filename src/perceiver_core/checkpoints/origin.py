"""What a file or a folder holds: whose model it is."""

from __future__ import annotations

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from perceiver_core.checkpoints.lucidrains import LAYOUTS
from perceiver_core.checkpoints.of_transformers import read_config

KINDS = ("perceiver-core", "transformers", "deepmind", "perceiver-pytorch")


def origin(path: Path) -> str:
    """Which of `KINDS` wrote a file or a folder, by what it holds. Nothing is unpickled.

    Args:
        path: a folder with `config.json`, a safetensors file, an `.npz`, or a pickle.

    Raises:
        FileNotFoundError: there is nothing, or a folder without `config.json`.
        ValueError: something else.

    Example:
        >>> import tempfile
        >>> import perceiver_core as pc
        >>> from perceiver_core.checkpoints.origin import origin
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     origin(pc.save(pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4), folder))
        'perceiver-core'
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    with path.open("rb") as file:
        start = file.read(16)
    if start[:1] == b"\x80" or path.suffix in (".pystate", ".pkl", ".pickle"):
        return "deepmind"  # old pickles have no mark at their start
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                return "deepmind"
        raise ValueError(
            f"{path} is a zip file, but not one of NumPy's arrays. If PyTorch wrote it, read it by torch.load with "
            "weights_only=True, and write its state dict by safetensors.torch.save_file"
        )
    return _of_weights(path)


def _of_folder(folder: Path) -> str:
    config = read_config(folder)
    if config.get("library") == "perceiver_core":
        return "perceiver-core"
    if config.get("model_type") == "perceiver" or config.get("architectures"):
        return "transformers"
    raise ValueError(f"{folder / 'config.json'} was written neither by perceiver-core nor by transformers")


def _of_weights(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, no .npz and no pickle: {error}") from error
    if any(f"{layout.read.format(0)}.norm_context.weight" in names for layout in LAYOUTS):
        return "perceiver-pytorch"
    if "perceiver.embeddings.latents" in names:
        raise ValueError(f"{path} holds weights of transformers; give their folder, which has config.json too")
    raise ValueError(f"{path} holds weights of no known model; its first names are {sorted(names)[:5]}")
