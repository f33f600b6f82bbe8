"""Configurations of values as JSON, and settings of modules as a line of text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from perceiver_core.registry.names import Json, Reference, _external, _names, join, label, name_of
from perceiver_core.registry.snapshot import Node, Part, Partial, Refusal, snapshot


def to_config(value: object) -> Json:
    """Return the configuration, as JSON, from which `from_config` rebuilds a value.

    Raises:
        ValueError: A part that is not registered, or a value that JSON cannot express.

    Example:
        >>> from functools import partial
        >>> import perceiver_core as pc
        >>> pc.registry.to_config(partial(pc.CrossAttend, num_heads=2))
        {'partial': 'CrossAttend', 'num_heads': 2}
    """
    return _written(snapshot(value), "", {})


def _written(node: Node, at: str, seen: dict[int, str]) -> Json:
    """Return a node at a path as JSON; `seen` has the paths of the parts so far, by the identity of their records."""
    if isinstance(node, Refusal):
        raise ValueError(f"{at or 'the model'} {node.reason}")
    if isinstance(node, list):
        return [_written(item, join(at, index), seen) for index, item in enumerate(node)]
    if isinstance(node, dict):
        return {"dict": _written_each(node, at, seen)}
    if isinstance(node, Reference):
        return {"name": name_of(node, at)}
    if isinstance(node, Partial):
        return {"partial": name_of(node.reference, at), **_written_each(node.arguments, at, seen)}
    if not isinstance(node, Part):
        return node
    if id(node.record) in seen:
        return {"same": seen[id(node.record)]}
    seen[id(node.record)] = at
    return {"part": name_of(node.reference, at), **_written_each(node.arguments, at, seen)}


def _written_each(nodes: Mapping[str, Node], at: str, seen: dict[int, str]) -> dict[str, Json]:
    return {key: _written(item, join(at, key), seen) for key, item in nodes.items()}


def settings(module: nn.Module) -> str:
    """Return the class and settings of a module in one line, so that later changes can be detected.

    Settings that the class names in `changes_no_result` are left out, since they do not affect the output.
    """
    of = type(module)
    if of in _names and of not in _external:
        free = getattr(of, "changes_no_result", ())
        names = [name for name in inspect.signature(of).parameters if name in vars(module) and name not in free]
        kept = {name: vars(module)[name] for name in names}
        described = ", ".join(f"{name}={_config_or_type(value)}" for name, value in kept.items())
    else:  # torch's own modules show all that matters; others, and lists of weights, may show where they are
        listing = isinstance(module, (nn.ParameterDict, nn.ParameterList))
        described = module.extra_repr() if of.__module__.startswith("torch.") and not listing else ""
    return f"{label(of)}({described})"


def _config_or_type(value: object) -> Json:
    try:
        return to_config(value)
    except ValueError:
        return type(value).__name__
