"""Conversion of models from transformers, Haiku and perceiver-pytorch to this library, or to transformers.

On the command line, use `python -m perceiver_core convert`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from perceiver_core.atomic_files import make_folder, rename, write_atomically
from perceiver_core.checkpoints import hub
from perceiver_core.checkpoints.card import card
from perceiver_core.checkpoints.folder import CONFIG
from perceiver_core.checkpoints.save_load import load, save
from perceiver_core.error_messages import errors_of, printable_errors
from perceiver_core.interop import reference_run
from perceiver_core.interop.haiku import load_with_config
from perceiver_core.interop.perceiver_pytorch import layout_of, load_perceiver_pytorch
from perceiver_core.interop.published_models import DEEPMIND_NUMERICS, TRANSFORMERS_NUMERICS
from perceiver_core.interop.transformers import load_transformers, save_transformers
from perceiver_core.interop.transformers_config import Config, read_config
from perceiver_core.interop.weight_files.state_dict_files import fetch
from perceiver_core.interop.weight_files.zip_archive import BoundedFile, is_zip, open_archive

FORMATS = ("perceiver-core", "transformers", "haiku", "perceiver-pytorch")
TARGETS = ("perceiver-core", "transformers")
TOLERANCE = 1e-6  # in standard deviations of the output
NUMERICS = {"transformers": TRANSFORMERS_NUMERICS, "deepmind": DEEPMIND_NUMERICS}


class _Plan(NamedTuple):
    """Options of `convert`, with defaults filled in. `path` is the local path of the source."""

    path: Path
    source_format: str
    target: str
    numerics: str
    arguments: Config
    check: bool


@printable_errors()
def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    source_format: str | None = None,
    target: str = "perceiver-core",
    numerics: str | None = None,
    arguments: Config | None = None,
    check: bool = False,
    tolerance: float = TOLERANCE,
) -> float | None:
    """Convert a model to the format of this library or of transformers.

    If the conversion fails, the destination is not written.

    Args:
        source: Path of a file or folder, or name of a model on the Hugging Face Hub (`owner/name`).
        destination: Folder to write. It must be empty or not exist yet.
        source_format: Format of the source: "perceiver-core", "transformers", "haiku" or "perceiver-pytorch". By
            default, `convert` detects it.
        target: Format to write: "perceiver-core" or "transformers".
        numerics: Implementation to reproduce, "transformers" or "deepmind" (see `Numerics`). Defaults to "deepmind" for
            Haiku sources and to "transformers" otherwise. Must be None for perceiver-pytorch sources.
        arguments: Values that the source does not contain. For perceiver-pytorch sources, these are constructor
            arguments of the model. For Haiku and perceiver-core sources, these are values of the transformers
            configuration, such as `{"num_blocks": 8}`. Must be empty for transformers sources.
        check: Whether to run this library's model and the model of the other library (transformers or
            perceiver-pytorch) on the same random inputs in float64 and compare the outputs. The other library must be
            installed.
        tolerance: Largest output difference that `check` accepts, in standard deviations of the other library's
            output. If the difference is larger or NaN, nothing is written, and the difference is still returned.

    Returns:
        The largest output difference, in the same unit as `tolerance`; None if `check` is False.

    Raises:
        FileNotFoundError: If the source does not exist, or if one of its files is missing.
        FileNotFoundError: If the source is on the Hugging Face Hub and huggingface_hub is not installed.
        ImportError: If `check` is True and the other library is not installed.
        ValueError: If an argument is not valid, or if the source cannot be converted to the target format.
        ValueError: If the destination is a file or a folder that is not empty, or if it cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from perceiver_core.interop.published_models import build
        >>> config = {"architectures": ["PerceiverForOpticalFlow"], "num_latents": 5, "d_latents": 16}
        >>> config |= {"num_self_attends_per_block": 1, "num_cross_attention_heads": 1, "train_size": [6, 8]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     theirs = pc.interop.save_transformers(build(config), Path(folder) / "theirs", config=config)
        ...     pc.interop.convert(theirs, Path(folder) / "ours")
        ...     pc.load(Path(folder) / "ours").encoder.latents.shape
        torch.Size([5, 16])
    """
    place, name = _free_folder(Path(destination)), Path(destination).absolute().name
    with _as_value_error(f"{source} cannot be read"):
        path = Path(source) if Path(source).exists() else fetch(source)
        source_format = source_format or detect_format(path)
        chosen = numerics or ("deepmind" if source_format == "haiku" else "transformers")
        plan = _Plan(path, source_format, target, chosen, arguments or {}, check)
        _check_plan(plan, numerics_given=bool(numerics))
        model, config = _read(plan)
    with _all_or_nothing(place) as folder:
        written = _write(model, config, plan, folder, name)
        if not check:
            return None
        with _as_value_error(f"the original of {source} cannot be run"):
            difference = _difference(plan, folder, model, written)
        if not difference <= tolerance:
            shutil.rmtree(folder)
    return difference


def detect_format(path: Path) -> str:
    """Detect the format of a model file or folder, one of `FORMATS`, without unpickling anything.

    Raises:
        FileNotFoundError: If the path does not exist, or is a folder without `config.json`.
        ValueError: If the format is not one of `FORMATS`.
    """
    if path.is_dir():
        config = read_config(path)
        if config.get("library") == "perceiver_core":
            return "perceiver-core"
        if config.get("model_type") == "perceiver" or config.get("architectures"):
            return "transformers"
        raise ValueError(f"{path / CONFIG} was written neither by perceiver-core nor by transformers")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    with path.open("rb") as file:
        start = file.read(1)
    if start == b"\x80" or path.suffix in (".pystate", ".pkl", ".pickle"):
        return "haiku"  # pickles of protocols 0 and 1 have no signature, so their file name decides
    if not is_zip(path):
        return _safetensors_format(path)
    with BoundedFile(path) as file, errors_of(f"{path} is not a complete zip archive"):
        names = open_archive(file).namelist()
    if all(name.endswith(".npy") for name in names):
        return "haiku"
    raise ValueError(
        f"{path} is a zip file, but not one of NumPy's arrays. If PyTorch wrote it, read it by torch.load with "
        "weights_only=True, and write its state dict by safetensors.torch.save_file"
    )


def _safetensors_format(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, no .npz and no pickle: {error}") from error
    if layout_of(names) is not None:
        return "perceiver-pytorch"
    if "perceiver.embeddings.latents" in names:
        raise ValueError(f"{path} holds weights of transformers; give their folder, which has {CONFIG} too")
    raise ValueError(f"{path} holds weights of no known model; its first names are {sorted(names)[:5]}")


def _free_folder(destination: Path) -> Path:
    """Check that a folder can be written at `destination`. Return its path with symbolic links resolved."""
    try:
        place = destination.resolve()
        is_loop = place.is_symlink()
    except RuntimeError:  # before Python 3.13, `resolve` raises it for links that form a loop
        is_loop = True
    if is_loop:
        raise ValueError(f"destination must lead to a folder; {destination} is a link to itself")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        found = "is not empty" if place.is_dir() else "is a file"
        raise ValueError(f"destination must be a new or an empty folder; {destination} {found}")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"destination must be in a folder that can be written to; {above} is none")
    return place


@contextmanager
def _as_value_error(message: str) -> Iterator[None]:
    """Context manager that converts errors other than ImportError, OSError and ValueError to ValueError."""
    try:
        yield
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from error


def _check_plan(plan: _Plan, *, numerics_given: bool) -> None:
    """Check that the options are valid and can be combined and, for `--check`, that the original library is installed.

    `numerics_given` says whether the caller of `convert` passed `numerics`.
    """
    for name, value, known in (
        ("source_format", plan.source_format, FORMATS),
        ("target", plan.target, TARGETS),
        ("numerics", plan.numerics, tuple(NUMERICS)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}; got {value!r}")
    if plan.source_format == plan.target == "perceiver-core":
        raise ValueError(f"{plan.path} is perceiver-core's already; to convert it, give --to transformers")
    if plan.source_format == "perceiver-pytorch" and (plan.target == "transformers" or numerics_given):
        raise ValueError("a model of perceiver-pytorch has no counterpart in transformers, and no choice of numerics")
    if plan.source_format == "transformers" and plan.arguments:
        raise ValueError(f"arguments must not be given for a model of transformers: its {CONFIG} has all values")
    if plan.source_format == "perceiver-core" and not plan.arguments:
        raise ValueError(
            "arguments must be given to write a model for transformers: the configuration that it gets, "
            f"--arguments original/{CONFIG}"
        )
    if not plan.check:
        return
    original = "transformers" if plan.target == "transformers" else plan.source_format
    if original == "haiku":
        raise ValueError("--check cannot run DeepMind's code; it checks what is written --to transformers")
    if plan.target == "perceiver-core" and original == "transformers" and plan.numerics != "transformers":
        raise ValueError("--check runs transformers, which differs by its numerics: give --numerics transformers")
    reference_run.library(original)


def _read(plan: _Plan) -> tuple[nn.Module, Config]:
    """Load the source model. Return the model and its transformers configuration ({} for perceiver-pytorch)."""
    numerics = NUMERICS[plan.numerics]
    if plan.source_format == "transformers":
        return load_transformers(plan.path, numerics=numerics), read_config(plan.path)
    if plan.source_format == "haiku":
        return load_with_config(plan.path, numerics, plan.arguments)
    if plan.source_format == "perceiver-pytorch":
        return load_perceiver_pytorch(plan.path, **plan.arguments), {}
    return load(plan.path), plan.arguments


def _write(model: nn.Module, config: Config, plan: _Plan, folder: Path, name: str) -> nn.Module:
    """Write a model to a folder in the target format. Load it again from the folder, and return the loaded model.

    `name` is the title of the model card.
    """
    if plan.target == "transformers":
        numerics = NUMERICS[plan.numerics]
        return load_transformers(save_transformers(model, folder, config=config, numerics=numerics), numerics=numerics)
    written: nn.Module = load(save(model, folder))
    write_atomically({folder / hub.CARD: card(written, name)})
    return written


def _difference(plan: _Plan, folder: Path, model: nn.Module, written: nn.Module) -> float:
    if plan.target == "transformers":
        return reference_run.transformers(folder, model)
    if plan.source_format == "transformers":
        return reference_run.transformers(plan.path, written)
    return reference_run.perceiver_pytorch(plan.path, plan.arguments, written)


@contextmanager
def _all_or_nothing(destination: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder and renames it to `destination` on exit.

    If an error occurs, or if the caller deletes the temporary folder, nothing is written to `destination`. After a
    crash, `destination` is as before or complete, and the temporary folder may be left over.
    """
    make_folder(destination.parent)
    folder = destination.with_name(f"{destination.name}.{secrets.token_hex(8)}.partial")
    folder.mkdir()
    try:
        yield folder
        if folder.exists():
            if os.name == "nt" and destination.exists():  # other systems replace an empty folder
                destination.rmdir()
            rename(folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
