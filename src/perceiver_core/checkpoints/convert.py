"""Models from one kind of file to another, written whole or not at all: `python -m perceiver_core convert`."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from perceiver_core.checkpoints import beside, files, hub
from perceiver_core.checkpoints.card import card
from perceiver_core.checkpoints.files import CONFIG
from perceiver_core.checkpoints.loading import load
from perceiver_core.checkpoints.lucidrains import lucidrains
from perceiver_core.checkpoints.of_haiku import with_config
from perceiver_core.checkpoints.of_transformers import hugging_face, read_config, to_hugging_face
from perceiver_core.checkpoints.origin import KINDS, origin
from perceiver_core.checkpoints.published import DEEPMIND, TRANSFORMERS, Numerics
from perceiver_core.checkpoints.saving import save

TARGETS = ("perceiver-core", "transformers")
NUMERICS = {"transformers": TRANSFORMERS, "deepmind": DEEPMIND}


class Plan(NamedTuple):
    """What is to be converted, and to what.

    Args:
        source: a file, a folder, or a name on the hub.
        destination: a folder that is not there, or empty.
        kind: whose model the source is, one of `origin.KINDS`; recognized by what it holds unless given.
        target: whose files are written, one of `TARGETS`.
        numerics: one of `NUMERICS`; those of the source unless given.
        arguments: what the source does not tell: of perceiver-pytorch's constructor; of transformers' configuration.
        check: whether the original model is run beside ours, in float64.
        tolerance: the largest difference between their outputs, in standard deviations of the original's, with which
            anything is written.
    """

    source: str
    destination: Path
    kind: str | None = None
    target: str = "perceiver-core"
    numerics: str | None = None
    arguments: Mapping[str, Any] = {}
    check: bool = False
    tolerance: float = 1e-6


class Found(NamedTuple):
    """What was read: a model, the configuration that transformers would have for it, and the choice of numerics."""

    model: nn.Module
    config: Mapping[str, Any]
    numerics: Numerics


def convert(plan: Plan) -> float | None:
    """Does what a plan says.

    Returns:
        The largest difference from the original model where that was asked for, in standard deviations of its output.
        Above the tolerance, or where it is no number, nothing was written.

    Raises:
        FileNotFoundError: no such source.
        ImportError: the library of the original, or huggingface_hub, is needed and not installed.
        ValueError: a source of no known kind, or one that cannot become the target; a destination that is not empty.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from perceiver_core.checkpoints import load, of_transformers, to_hugging_face
        >>> from perceiver_core.checkpoints.convert import Plan, convert
        >>> config = {"architectures": ["PerceiverForOpticalFlow"], "num_latents": 5, "d_latents": 16}
        >>> config |= {"num_self_attends_per_block": 1, "num_cross_attention_heads": 1, "train_size": [6, 8]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to = Path(folder) / "theirs"
        ...     theirs = to_hugging_face(of_transformers.build(config), to, config=config)
        ...     convert(Plan(str(theirs), Path(folder) / "ours"))
        ...     load(Path(folder) / "ours").encoder.latents.shape
        torch.Size([5, 16])
    """
    destination = _free(plan.destination)
    with _understood(f"{plan.source} cannot be read"):
        path = Path(plan.source)
        path = path if path.exists() else files.fetched(plan.source)
        plan = plan._replace(kind=plan.kind or origin(path))
        _check_plan(plan)
        found = _read(path, plan)
    with _all_or_nothing(destination) as folder:
        again = _written(found, plan, folder)
        if not plan.check:
            return None
        with _understood(f"the original of {plan.source} cannot be run"):
            if plan.target == "transformers":
                difference = beside.transformers(folder, found.model)
            elif plan.kind == "transformers":
                difference = beside.transformers(path, again)
            else:
                difference = beside.perceiver_pytorch(path, plan.arguments, again)
        if not difference <= plan.tolerance:
            shutil.rmtree(folder)
    return difference


def _free(destination: Path) -> Path:
    """Where a destination leads, if a folder can be put there.

    Raises:
        ValueError: something is there, or no folder can be made.
    """
    try:
        place = destination.resolve()
    except RuntimeError as error:  # before Python 3.13
        raise ValueError(f"destination must lead to a folder; {destination} is a link to itself") from error
    if place.is_symlink():
        raise ValueError(f"destination must lead to a folder; {destination} is a link to itself")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"destination must be a folder that is not there yet, or empty; {destination} is there")
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"destination must be in a folder that can be written to; {above} is none")
    return place


@contextmanager
def _understood(what: str) -> Iterator[None]:
    """Whatever a file of another kind than it seems makes a reader run into, in words."""
    try:
        yield
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from error


def _check_plan(plan: Plan) -> None:
    """Raises ValueError where one thing that is asked for does not go with another."""
    numerics = plan.numerics or ("deepmind" if plan.kind == "deepmind" else "transformers")
    for name, value, known in (
        ("kind", plan.kind, KINDS),
        ("target", plan.target, TARGETS),
        ("numerics", numerics, tuple(NUMERICS)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}; got {value!r}")
    if plan.kind == plan.target == "perceiver-core":
        raise ValueError(f"{plan.source} is perceiver-core's already; to convert it, give --to transformers")
    if plan.kind == "perceiver-pytorch" and (plan.target == "transformers" or plan.numerics):
        raise ValueError("a model of perceiver-pytorch has no counterpart in transformers, and no choice of numerics")
    if plan.kind == "transformers" and plan.arguments:
        raise ValueError(f"arguments must not be given for a model of transformers: its {CONFIG} tells all")
    if plan.kind == "perceiver-core" and not plan.arguments:
        raise ValueError(
            "arguments must be given to write a model for transformers: the configuration that it gets, "
            f"--arguments original/{CONFIG}"
        )
    if not plan.check:
        return
    if plan.kind == "deepmind" and plan.target == "perceiver-core":
        raise ValueError("--check cannot run DeepMind's code; it checks what is written --to transformers")
    if plan.kind == "transformers" and plan.target == "perceiver-core" and numerics != "transformers":
        raise ValueError("--check runs transformers, which differs by its numerics: give --numerics transformers")
    beside.library("perceiver-pytorch" if plan.kind == "perceiver-pytorch" else "transformers")


def _read(path: Path, plan: Plan) -> Found:
    """The model in a file or folder of a kind that is known."""
    numerics = NUMERICS[plan.numerics or ("deepmind" if plan.kind == "deepmind" else "transformers")]
    if plan.kind == "transformers":
        return Found(hugging_face(path, numerics=numerics), read_config(path), numerics)
    if plan.kind == "deepmind":
        model, config = with_config(path, numerics, plan.arguments)
        return Found(model, {"model_type": "perceiver", **config}, numerics)
    if plan.kind == "perceiver-pytorch":
        return Found(lucidrains(path, **plan.arguments), {}, numerics)
    return Found(load(path), plan.arguments, numerics)


def _written(found: Found, plan: Plan, folder: Path) -> nn.Module:
    """The model that a folder gives after one was written to it."""
    if plan.target == "transformers":
        to_hugging_face(found.model, folder, config=found.config, numerics=found.numerics)
        return hugging_face(folder, numerics=found.numerics)
    again = load(save(found.model, folder))
    (folder / hub.CARD).write_text(card(again, plan.destination.absolute().name), encoding="utf-8")
    return again


@contextmanager
def _all_or_nothing(destination: Path) -> Iterator[Path]:
    """A folder beside the destination, which takes its place at the end; not where there is an error, or it is gone."""
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
