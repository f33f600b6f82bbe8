"""Format of saved models: a folder with weights in `model.safetensors` and constructor calls in `config.json`."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perceiver_core import registry

# Format version. It is incremented if old files would be read differently, such as when a constructor default changes.
FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 2**20  # bytes


def parse_config(text: str | bytes, source: str) -> registry.Json:
    """Parse the text of a `config.json` and return the model configuration.

    Args:
        text: Text of the file.
        source: Description of the text for error messages, such as its path.

    Raises:
        ValueError: If the text is too long or is not valid JSON in UTF-8.
        ValueError: If the text was not written by `save`, or has a different format version.
    """
    config = parse_json(text, source, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    if not isinstance(config, dict) or config.get("library") != "perceiver_core" or "model" not in config:
        raise ValueError(
            f"{source} was not written by perceiver_core.save; give load a folder that was, and one of transformers to "
            "interop.load_transformers"
        )
    written = config.get("format")
    if type(written) is not int or written != FORMAT:
        raise ValueError(
            f"{source} has format {written!r:.40}; this version reads {FORMAT}. "
            "Update perceiver-core if the file is newer, or save it again with the version that wrote it"
        )
    return config["model"]


def parse_json(text: str | bytes, source: str, *, largest: int = LARGEST_CONFIG, **hooks: Any) -> registry.Json:
    """Parse JSON text.

    Args:
        text: Text, or its UTF-8 encoding.
        source: Description of the text for error messages, such as its path.
        largest: Maximum length of `text`.
        hooks: Keyword arguments of `json.loads`.

    Raises:
        ValueError: If the text is too long or is not valid JSON in UTF-8.
    """
    if len(text) > largest:
        raise ValueError(f"{source} must have at most {largest} bytes; it has more. Copy it again")
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, **hooks)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON in UTF-8: {error}. Copy it again") from error


def read_at_most(path: Path, largest: int = LARGEST_CONFIG) -> bytes:
    """Read at most `largest + 1` bytes of a file. A result longer than `largest` means that the file is too large."""
    with path.open("rb") as file:
        return file.read(largest + 1)


def _unique(pairs: list[tuple[str, registry.Json]]) -> dict[str, registry.Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object has a key twice; its keys are {[key for key, _ in pairs][:5]}")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number:.40} is not a finite number")
    return value


def write_atomically(files: dict[Path, Callable[[Path], object]]) -> None:
    """Write all files under temporary names, then rename them. Temporary files are removed even after an error.

    `files` maps the final path of each file to a function `path -> object` that writes the file to a temporary path.
    """
    written = {path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial"): path for path in files}
    try:
        for temporary, path in written.items():
            temporary.touch()
            mode = temporary.stat().st_mode  # follows the user's umask, unlike files created by save_file
            files[path](temporary)
            temporary.chmod(mode)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        for temporary, path in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)
