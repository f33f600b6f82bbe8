"""Folder of a saved model: weights in `model.safetensors`, constructor calls in `config.json`."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perceiver_core import registry

# Raised when an old file would mean something else, as it does when a default of a constructor changes.
FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 2**20  # bytes


def parse_config(text: str | bytes, source: str) -> registry.Json:
    """Return the configuration of the model in the text of a `config.json`, which messages name `source`.

    Raises:
        ValueError: Text that is too long, no JSON in UTF-8, not written by `save`, or of another format.
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
    """Return the value of JSON text; `hooks` are those of `json.loads`.

    Raises:
        ValueError: Text of more than `largest` characters or bytes, or that is no JSON in UTF-8.
    """
    if len(text) > largest:
        raise ValueError(f"{source} must have at most {largest} bytes; it has more. Copy it again")
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, **hooks)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON in UTF-8: {error}. Copy it again") from error


def read_at_most(path: Path, largest: int = LARGEST_CONFIG) -> bytes:
    """Return the first bytes of a file, one more than `largest` if it is longer."""
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
    """Write all files under temporary names, then rename each; temporary files are removed also after an error.

    `files` has, for each path, a function that writes a file to the path passed to it.
    """
    written = {path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial"): path for path in files}
    try:
        for temporary, path in written.items():
            temporary.touch()
            mode = temporary.stat().st_mode  # as the user's umask has it; save_file makes private files
            files[path](temporary)
            temporary.chmod(mode)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        for temporary, path in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)
