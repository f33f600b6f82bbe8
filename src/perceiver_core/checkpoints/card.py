"""The model card beside a saved model: what it is made of, and how to load it."""

from __future__ import annotations

import json

from torch import nn

from perceiver_core import registry

_WIDTH = 100


def card(model: nn.Module, name: str) -> str:
    """The text of a model card, with the metadata that the hub reads.

    Args:
        model: made of registered parts.
        name: where it is loaded from, a folder or a name on the hub.

    Raises:
        ValueError: a part that is not registered.

    Example:
        >>> from torch import nn
        >>> from perceiver_core.checkpoints.card import card
        >>> print(card(nn.LayerNorm(8), "somebody/norm").splitlines()[6])
        # norm
    """
    calls = as_calls(registry.to_config(model))
    weights = sum(parameter.numel() for parameter in model.parameters())
    own = sorted({label for label in map(_home, model.modules()) if label not in ("perceiver_core", "torch")})
    first = f"Import what registers parts that are not the library's first: {', '.join(own)}.\n\n" if own else ""
    return (
        "---\nlibrary_name: perceiver-core\ntags:\n- perceiver\n---\n\n"
        f"# {name.rstrip('/').rpartition('/')[2]}\n\n"
        f"A {type(model).__name__} with {weights:,} parameters, for perceiver-core.\n\n"
        f"## Load it\n\n{first}"
        "```python\nimport perceiver_core as pc\n\n"
        f"model = pc.checkpoints.from_pretrained({_quoted(name)})\n```\n\n"
        f"## What it is made of\n\n```python\n{calls}\n```\n"
    )


def as_calls(description: registry.Json, indent: int = 0) -> str:
    """A description of `registry.to_config` as the constructor calls that it stands for.

    A part that stands in two places is written out in the first; in the second, its path is.

    Example:
        >>> from functools import partial
        >>> import perceiver_core as pc
        >>> from perceiver_core.checkpoints.card import as_calls
        >>> as_calls(pc.registry.to_config(partial(pc.MLP, widening_factor=4, activation=pc.GEGLU())))
        'partial(MLP, widening_factor=4, activation=GEGLU())'
    """
    if isinstance(description, list):
        return _wrapped("[", [as_calls(item, indent + 4) for item in description], "]", indent)
    if not isinstance(description, dict):
        return _quoted(description) if isinstance(description, str) else repr(description)
    if "dict" in description:
        pairs = [f"{_quoted(key)}: {as_calls(item, indent + 4)}" for key, item in description["dict"].items()]
        return _wrapped("{", pairs, "}", indent)
    for kind in ("name", "same"):
        if kind in description:
            return str(description[kind])
    kind = "part" if "part" in description else "partial"
    given = [f"{key}={as_calls(item, indent + 4)}" for key, item in description.items() if key != kind]
    if kind == "partial":
        return _wrapped("partial(", [description[kind], *given], ")", indent)
    return _wrapped(f"{description[kind]}(", given, ")", indent)


def _wrapped(start: str, items: list[str], end: str, indent: int) -> str:
    """Items on one line if they fit, else one a line."""
    line = f"{start}{', '.join(items)}{end}"
    if "\n" not in line and indent + len(line) <= _WIDTH:
        return line
    margin = " " * (indent + 4)
    return "\n".join([start, *(f"{margin}{item}," for item in items), f"{' ' * indent}{end}"])


def _quoted(text: str) -> str:
    """As the formatters of Python write it."""
    return json.dumps(text, ensure_ascii=False)


def _home(module: nn.Module) -> str:
    """The library that a part is of; its module, where that is none of ours."""
    home = type(module).__module__
    top = home.partition(".")[0]
    return top if top in ("perceiver_core", "torch") else home
