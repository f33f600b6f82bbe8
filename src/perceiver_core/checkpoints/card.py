"""Model card with the architecture of a saved model and instructions to load it."""

from __future__ import annotations

import json

from torch import nn

from perceiver_core import registry
from perceiver_core.checkpoints.save_load import unwrapped

_WIDTH = 100


def card(model: nn.Module, name: str) -> str:
    """Return the text of a model card (README.md), including the metadata for the Hugging Face Hub.

    Args:
        model: Model built from registered classes (see `register`).
        name: Folder or Hub repository (`owner/name`) of the model, for the card's title and loading instructions.
    """
    model = unwrapped(model)
    calls = as_calls(registry.to_config(model))
    weights = sum(parameter.numel() for parameter in model.parameters())
    homes = {type(module).__module__ for module in model.modules()}
    own = sorted(home for home in homes if home.partition(".")[0] not in ("perceiver_core", "torch"))
    first = f"Import what registers parts that are not the library's first: {', '.join(own)}.\n\n" if own else ""
    return (
        "---\nlibrary_name: perceiver-core\ntags:\n- perceiver\n---\n\n"
        f"# {name.rstrip('/').rpartition('/')[2]}\n\n"
        f"A {type(model).__name__} with {weights:,} parameters, for perceiver-core.\n\n"
        f"## Load it\n\n{first}"
        "```python\nimport perceiver_core as pc\n\n"
        f"model = pc.checkpoints.from_pretrained({_quoted(name)})\n```\n\n"
        f"## Architecture\n\n```python\n{calls}\n```\n"
    )


def as_calls(config: registry.Json, indent: int = 0) -> str:
    """Return a configuration from `registry.to_config` as constructor calls in Python syntax.

    If a module occurs several times, later occurrences are replaced by the path of the first occurrence, such as
    adapter.positions. `indent` is the number of spaces in front of the first line, which the caller adds.
    """
    if isinstance(config, list):
        return _wrapped("[", [as_calls(item, indent + 4) for item in config], "]", indent)
    if not isinstance(config, dict):
        return _quoted(config) if isinstance(config, str) else repr(config)
    if "dict" in config:
        pairs = [f"{_quoted(key)}: {as_calls(item, indent + 4)}" for key, item in config["dict"].items()]
        return _wrapped("{", pairs, "}", indent)
    for tag in ("name", "same"):
        if tag in config:
            return str(config[tag])
    tag = "part" if "part" in config else "partial"
    arguments = [f"{key}={as_calls(item, indent + 4)}" for key, item in config.items() if key != tag]
    if tag == "partial":
        return _wrapped("partial(", [config[tag], *arguments], ")", indent)
    return _wrapped(f"{config[tag]}(", arguments, ")", indent)


def _wrapped(start: str, items: list[str], end: str, indent: int) -> str:
    """Return `start`, all items and `end` on one line if they fit, otherwise with one item per line."""
    line = f"{start}{', '.join(items)}{end}"
    if "\n" not in line and indent + len(line) <= _WIDTH:
        return line
    margin = " " * (indent + 4)
    return "\n".join([start, *(f"{margin}{item}," for item in items), f"{' ' * indent}{end}"])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
