"""Detection of the format of a file or folder from its content."""

from __future__ import annotations

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from perceiver_core.interop.perceiver_pytorch import layout_of
from perceiver_core.interop.transformers_config import read_config

FORMATS = ("perceiver-core", "transformers", "haiku", "perceiver-pytorch")


def detect_format(path: Path) -> str:
    """Return the one of `FORMATS` that a file or folder has. Nothing is unpickled.

    Args:
        path: Folder with `config.json`, safetensors file, `.npz`, or pickle.

    Raises:
        FileNotFoundError: There is nothing, or a folder without `config.json`.
        ValueError: The format is another one.

    Example:
        >>> import tempfile
        >>> import perceiver_core as pc
        >>> from perceiver_core.interop.format_detection import detect_format
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     detect_format(pc.save(pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4), folder))
        'perceiver-core'
    """
    if path.is_dir():
        return _folder_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    with path.open("rb") as file:
        start = file.read(1)
    if start == b"\x80" or path.suffix in (".pystate", ".pkl", ".pickle"):
        return "haiku"  # pickles of old protocols do not start with a mark
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                return "haiku"
        raise ValueError(
            f"{path} is a zip file, but not one of NumPy's arrays. If PyTorch wrote it, read it by torch.load with "
            "weights_only=True, and write its state dict by safetensors.torch.save_file"
        )
    return _state_dict_format(path)


def _folder_format(folder: Path) -> str:
    config = read_config(folder)
    if config.get("library") == "perceiver_core":
        return "perceiver-core"
    if config.get("model_type") == "perceiver" or config.get("architectures"):
        return "transformers"
    raise ValueError(f"{folder / 'config.json'} was written neither by perceiver-core nor by transformers")


def _state_dict_format(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, no .npz and no pickle: {error}") from error
    if layout_of(names) is not None:
        return "perceiver-pytorch"
    if "perceiver.embeddings.latents" in names:
        raise ValueError(f"{path} holds weights of transformers; give their folder, which has config.json too")
    raise ValueError(f"{path} holds weights of no known model; its first names are {sorted(names)[:5]}")
