"""Weights of other libraries under our names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Weights = dict[str, Tensor]


class Source(NamedTuple):
    """Which of their tensors is one of ours; or which part of it, where it is several of ours, one above the other."""

    name: str
    part: int = 0
    parts: int = 1


Sources = dict[str, Source]  # by our name


def both(ours: str, theirs: str) -> Sources:
    """Weight and bias of a layer."""
    return {f"{ours}.{kind}": Source(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def fill(model: nn.Module, sources: Sources, weights: Mapping[str, Tensor]) -> None:
    """Puts their weights in the place of a model's: the very tensors, no copies.

    Args:
        model: ours, on whatever device; the meta device takes no memory.
        sources: where each name in the model's state comes from.
        weights: theirs.

    Raises:
        ValueError: weights that are missing, that nothing takes, or of another shape; the first five are named.
    """
    state = model.state_dict()
    wanted = {s.name: (len(state[ours]) * s.parts, *state[ours].shape[1:]) for ours, s in sources.items()}
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    others = [
        f"{name} has shape {tuple(weights[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    said = [f"missing {missing[:5]}"] * bool(missing) + [f"unknown {unknown[:5]}"] * bool(unknown) + others[:5]
    if said:
        raise ValueError(f"state_dict does not fit the model that it was said to be of: {'; '.join(said)}")
    found = {ours: weights[s.name].detach().chunk(s.parts)[s.part] for ours, s in sources.items()}
    model.load_state_dict(found, assign=True)


def weights_of(given: Mapping[str, Tensor] | str | os.PathLike[str]) -> Weights:
    """The tensors of a state dict, or of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or something among the tensors that is none.
    """
    if not isinstance(given, Mapping):
        return _of_file(Path(given))
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict must hold tensors alone; {name!r} is of type {type(value).__name__}")
    return dict(given)


def _of_file(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give the path of a safetensors file, or a state dict")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            tied = file.metadata() or {}  # here safetensors' save_model says which names it left out, and for which
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file: {error}. Read a file of another kind yourself (a .pt file by "
            "torch.load with weights_only=True), and give its state dict"
        ) from error
    return weights | {name: weights[kept] for name, kept in tied.items() if kept in weights}
