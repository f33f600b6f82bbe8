"""Helpers for dictionaries of modules that are keyed by modality (text, image, audio), as in `heads.Multimodal`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


def check(argument: str, parts: Mapping[str, nn.Module], part_name: str) -> None:
    """Check that `parts` is a non-empty mapping from modality names to modules.

    Names must be valid names of modules and parameters: not empty, without a dot, and not an attribute of
    `nn.ModuleDict` or `nn.ParameterDict`, such as "values" or "type".

    Args:
        argument: Name of the mapping in error messages, such as "heads".
        parts: Dictionary of modules, keyed by modality.
        part_name: Noun for one of the modules in error messages, such as "a head".
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"{argument} must be a dictionary by modality; got {type(parts).__name__}")
    if not parts:
        raise ValueError(f"{argument} must hold {part_name} at least; got none")
    for name, part in parts.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have strings as keys; got {name!r}")
        if not name or "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            raise ValueError(
                f"{argument} must not have the name {name!r}: it is empty, has a dot, or is an attribute of "
                "torch's modules. Choose another"
            )
        if not isinstance(part, nn.Module):
            raise TypeError(f"{argument}[{name!r}] must be a module; got {type(part).__name__}. Build it first")


def check_names(argument: str, values: object, known: Iterable[str]) -> None:
    """Check that `values` is a mapping and that all its keys are modality names in `known`."""
    known = list(known)
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must be a dictionary by modality, of {known}; got {type(values).__name__}")
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{argument} names {unknown}; the modalities are {known}")


def call(argument: str, modality: str, part: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `part`. If it raises TypeError or ValueError, name the argument and the modality in the error message."""
    if torch.compiler.is_compiling():
        return part(*args, **kwargs)
    try:
        return part(*args, **kwargs)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # a subclass's constructor may take other arguments
            raise
        raise type(error)(f"{argument}[{modality!r}]: {error}") from error
