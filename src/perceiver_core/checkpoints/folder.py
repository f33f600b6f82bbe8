"""Format of saved models: a folder with weights in `model.safetensors` and constructor calls in `config.json`.

`config.json` contains the SHA-256 digests of `model.safetensors` and of the configuration itself, so that damaged files
and weights of another save are rejected.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from perceiver_core import registry

# Format version. It is incremented if old files would be read differently, such as when a constructor default changes.
FORMAT = 1
_KEYS = frozenset({"library", "format", "sha256", "model"})
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 2**20  # bytes
_DIGEST = re.compile("[0-9a-f]{64}")


def config_text(model: registry.Json, digest: str) -> str:
    """Return the text of a `config.json`.

    Args:
        model: Configuration of the model; see `registry.to_config`.
        digest: SHA-256 digest of the weights file in hexadecimal digits.
    """
    digests = {WEIGHTS: digest, "model": _digest(model)}
    content = {"library": "perceiver_core", "format": FORMAT, "sha256": digests, "model": model}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def parse_config(text: str | bytes, source: str) -> tuple[registry.Json, str | None]:
    """Parse the text of a `config.json`. Return the model configuration and the digest of the weights file.

    The digest is None if the file was written before digests were introduced.

    Args:
        text: Text of the file.
        source: Description of the text for error messages, such as its path.

    Raises:
        ValueError: If the text is too long or is not valid JSON in UTF-8.
        ValueError: If the text was not written by `save`, was changed afterwards, or has a different format version.
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
    if unknown := config.keys() - _KEYS:
        raise ValueError(
            f"{source} must hold the entries {sorted(_KEYS)}; got {sorted(unknown)} as well. Copy it again"
        )
    if "sha256" not in config:
        return config["model"], None
    digests = config["sha256"] if isinstance(config["sha256"], dict) else {}
    if not _DIGEST.fullmatch(str(digests.get(WEIGHTS))):
        raise ValueError(f"{source} must have the SHA-256 digest of {WEIGHTS} in 'sha256'. Copy it again")
    if digests.get("model") != _digest(config["model"]):
        raise ValueError(
            f"{source} was changed after it was saved: its entry 'model' does not have the digest in 'sha256'. Copy it "
            "again. To change a model, load it, change it in Python and save it again"
        )
    return config["model"], digests[WEIGHTS]


def _digest(model: registry.Json) -> str:
    """Return the digest of a configuration. It does not depend on white space or on the order of keys."""
    return hashlib.sha256(json.dumps(model, sort_keys=True, allow_nan=False).encode()).hexdigest()


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
