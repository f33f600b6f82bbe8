"""Conversion of models between formats, written completely or not at all: `python -m perceiver_core convert`."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from torch import nn

from perceiver_core.checkpoints import hub
from perceiver_core.checkpoints.card import card
from perceiver_core.checkpoints.folder import CONFIG
from perceiver_core.checkpoints.loading import load
from perceiver_core.checkpoints.saving import save
from perceiver_core.interop import reference_run
from perceiver_core.interop.format_detection import FORMATS, detect_format
from perceiver_core.interop.haiku import load_with_config
from perceiver_core.interop.perceiver_pytorch import load_perceiver_pytorch
from perceiver_core.interop.published_models import DEEPMIND_NUMERICS, TRANSFORMERS_NUMERICS
from perceiver_core.interop.transformers import load_transformers, save_transformers
from perceiver_core.interop.transformers_config import Config, read_config
from perceiver_core.interop.weight_files.state_dict_files import fetch

TARGETS = ("perceiver-core", "transformers")
TOLERANCE = 1e-6  # standard deviations
NUMERICS = {"transformers": TRANSFORMERS_NUMERICS, "deepmind": DEEPMIND_NUMERICS}


class _Plan(NamedTuple):
    """Arguments of `convert`, with the detected format and numerics."""

    path: Path
    source_format: str
    target: str
    numerics: str
    arguments: Config


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
    """Read a model of any format and write it in another.

    Args:
        source: File, folder, or name on the Hugging Face hub.
        destination: Folder that does not exist, or is empty.
        source_format: Format of the source: "perceiver-core", "transformers", "haiku" or "perceiver-pytorch"; detected
            from its content by default.
        target: Format to write: "perceiver-core" or "transformers".
        numerics: "transformers" or "deepmind", see `Numerics`; those of the source by default.
        arguments: Values that the source does not contain: arguments of perceiver-pytorch's constructor, or entries of
            transformers' configuration.
        check: Whether to compare the outputs with those of the original model, in float64.
        tolerance: Largest difference between their outputs, in standard deviations of the original's, up to which the
            model is written.

    Returns:
        The largest difference from the original model if `check` is set, in standard deviations of its output. Above
        the tolerance, or if it is NaN, nothing was written.

    Raises:
        FileNotFoundError: There is no such source.
        ImportError: The library of the original, or huggingface_hub, is needed and not installed.
        ValueError: The source is of no known format or cannot become the target, or the destination is not empty.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import perceiver_core as pc
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
        plan = _Plan(path, source_format, target, chosen, arguments or {})
        _check_plan(plan, numerics_given=bool(numerics))
        if check:
            _check_can_run(plan)
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


def _free_folder(destination: Path) -> Path:
    """Resolve a destination to a path at which a folder can be written.

    Raises:
        ValueError: It exists and is not an empty folder, or no folder can be created there.
    """
    try:
        place = destination.resolve()
    except RuntimeError as error:  # before Python 3.13
        raise ValueError(f"destination must lead to a folder; {destination} is a link to itself") from error
    if place.is_symlink():
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
    """Convert unexpected exceptions, raised by reading a file of another format, to a ValueError."""
    try:
        yield
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from error


def _check_plan(plan: _Plan, *, numerics_given: bool) -> None:
    """Raise ValueError if one argument excludes another."""
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


def _check_can_run(plan: _Plan) -> None:
    """Raise unless the original model can be run for comparison."""
    if plan.target == "perceiver-core" and plan.source_format == "haiku":
        raise ValueError("--check cannot run DeepMind's code; it checks what is written --to transformers")
    if plan.target == "perceiver-core" and plan.source_format == "transformers" and plan.numerics != "transformers":
        raise ValueError("--check runs transformers, which differs by its numerics: give --numerics transformers")
    reference_run.library("perceiver-pytorch" if plan.source_format == "perceiver-pytorch" else "transformers")


def _read(plan: _Plan) -> tuple[nn.Module, Config]:
    """Read the source model; return it with the configuration that transformers would have for it."""
    numerics = NUMERICS[plan.numerics]
    if plan.source_format == "transformers":
        return load_transformers(plan.path, numerics=numerics), read_config(plan.path)
    if plan.source_format == "haiku":
        model, config = load_with_config(plan.path, numerics, plan.arguments)
        return model, {"model_type": "perceiver", **config}
    if plan.source_format == "perceiver-pytorch":
        return load_perceiver_pytorch(plan.path, **plan.arguments), {}
    return load(plan.path), plan.arguments


def _write(model: nn.Module, config: Config, plan: _Plan, folder: Path, name: str) -> nn.Module:
    """Write a model to a folder, and return the model as read back from the folder."""
    if plan.target == "transformers":
        numerics = NUMERICS[plan.numerics]
        return load_transformers(save_transformers(model, folder, config=config, numerics=numerics), numerics=numerics)
    written: nn.Module = load(save(model, folder))
    (folder / hub.CARD).write_text(card(written, name), encoding="utf-8")
    return written


def _difference(plan: _Plan, folder: Path, model: nn.Module, written: nn.Module) -> float:
    if plan.target == "transformers":
        return reference_run.transformers(folder, model)
    if plan.source_format == "transformers":
        return reference_run.transformers(plan.path, written)
    return reference_run.perceiver_pytorch(plan.path, plan.arguments, written)


@contextmanager
def _all_or_nothing(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that is moved to the destination at the end, unless an error occurs or it is deleted."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.with_name(f"{destination.name}.{secrets.token_hex(8)}.partial")
    folder.mkdir()
    try:
        yield folder
        if folder.exists():
            if destination.exists():
                destination.rmdir()
            folder.replace(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
