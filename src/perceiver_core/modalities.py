"""Parts by the name of a kind (text, picture, sound): what adapters, queries and heads of several kinds share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def check(argument: str, parts: Mapping[str, nn.Module], what: str) -> None:
    """Raises unless every part is a module, by a name that a module can have.

    Args:
        argument: what to call `parts` in the message.
        parts: the modules, by name.
        what: what a part is.

    Raises:
        TypeError: anything but a dictionary of modules.
        ValueError: no part at all; an empty name, one with a dot, or one that torch.nn.ModuleDict or ParameterDict has
            another use for, "values" and "type" for example.
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"{argument} must be a dictionary by kind; got {type(parts).__name__}")
    if not parts:
        raise ValueError(f"{argument} must name {what} at least; got none")
    for name, part in parts.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have names for keys; got {name!r}")
        if not name or "." in name or any(hasattr(each(), name) for each in (nn.ModuleDict, nn.ParameterDict)):
            raise ValueError(
                f"{argument} must not have the name {name!r}: it is empty, has a dot, or is an attribute of "
                "torch's modules. Choose another"
            )
        if not isinstance(part, nn.Module):
            raise TypeError(f"{argument}[{name!r}] must be a module; got {type(part).__name__}. Build it first")


def call(argument: str, kind: str, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a part gives; a TypeError or ValueError of its own says of which kind it is."""
    if torch.compiler.is_compiling():
        return part(*args, **kwargs)
    try:
        return part(*args, **kwargs)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # others need not be made from a message
            raise
        raise type(error)(f"{argument}[{kind!r}]: {error}") from error
