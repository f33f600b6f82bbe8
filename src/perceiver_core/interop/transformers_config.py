"""Defaults and validation of the configuration of Perceiver models in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from torch import nn

from perceiver_core.checkpoints.folder import CONFIG
from perceiver_core.interop.weight_files.state_dict_files import read_json
from perceiver_core.registry import Json

Config: TypeAlias = Mapping[str, Json]

ARCHITECTURES = TEXT, SEQUENCE, LEARNED, PIXELS, CONVOLUTIONAL, FLOW, MULTIMODAL = (
    "PerceiverForMaskedLM",
    "PerceiverForSequenceClassification",
    "PerceiverForImageClassificationLearned",
    "PerceiverForImageClassificationFourier",
    "PerceiverForImageClassificationConvProcessing",
    "PerceiverForOpticalFlow",
    "PerceiverForMultimodalAutoencoding",
)
DEFAULTS: dict[str, Json] = {
    "num_latents": 256,
    "d_latents": 1280,
    "d_model": 768,
    "num_blocks": 1,
    "num_self_attends_per_block": 26,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "qk_channels": None,
    "v_channels": None,
    "cross_attention_shape_for_attention": "kv",
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "attention_probs_dropout_prob": 0.1,
    "use_query_residual": True,
    "vocab_size": 262,
    "max_position_embeddings": 2048,
    "image_size": 56,
    "train_size": [368, 496],
    "num_frames": 16,
    "audio_samples_per_frame": 1920,
    "samples_per_patch": 16,
    "output_shape": [1, 16, 224, 224],
    "output_num_channels": 512,
    "_label_trainable_num_channels": 1024,
    "num_labels": 2,
}
# Fourier features of the image classifiers. This library adds these entries; in transformers the values are constants.
# `max_resolution` is a pair of sizes, or None for the published resolution.
FOURIER: dict[str, Json] = {"num_bands": 64, "max_resolution": None}
# Activations by name. "gelu" is missing, because `Numerics` selects it.
ACTIVATIONS = {
    "gelu_pytorch_tanh": nn.GELU("tanh"),
    "gelu_new": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
}
LENGTHS = {"train_size": 2, "output_shape": 4, "max_resolution": 2}
CHOICES: dict[str, tuple[Json, ...]] = {
    "hidden_act": ("gelu", *ACTIVATIONS),
    "cross_attention_shape_for_attention": ("kv", "q"),
    "use_query_residual": (True, False),
}
LARGEST = 2**31 - 1
SMALLEST = {"num_self_attends_per_block": 0}  # smallest valid sizes; 1 if not listed


def complete(config: Config) -> dict[str, Json]:
    """Return a copy of `config` in which missing entries have default values.

    If `config` has an entry `id2label`, its length is used as `num_labels`.

    Raises:
        ValueError: If an entry is not valid.
    """
    architecture_of(config)
    completed = {**DEFAULTS, **FOURIER, **config}
    if (labels := config.get("id2label")) is not None:
        if not isinstance(labels, Mapping) or not labels:
            raise ValueError(f"config must have id2label as a dictionary of labels; got {labels!r:.60}")
        completed["num_labels"] = len(labels)
    for name, default in (DEFAULTS | FOURIER).items():
        if expected := _expected_unless_valid(name, completed[name], default):
            raise ValueError(f"config must have {name} as {expected}; got {completed[name]!r:.60}")
    return completed


def architecture_of(config: Config) -> str:
    """Return the architecture that a configuration names, one of `ARCHITECTURES`.

    Raises:
        ValueError: If the configuration does not name exactly one known architecture.
    """
    names = config.get("architectures")
    if not isinstance(names, (list, tuple)) or len(names) != 1 or names[0] not in ARCHITECTURES:
        own = config.get("library") == "perceiver_core"
        hint = ". It is one of perceiver_core.save: give it to load" if own else ""
        raise ValueError(
            f"config must name one of {list(ARCHITECTURES)} as its architectures, in a list; got {names!r:.80}{hint}"
        )
    return str(names[0])


def read_config(folder: str | PathLike[str]) -> dict[str, Json]:
    """Read `config.json` from a folder.

    Raises:
        FileNotFoundError: If the folder does not contain the file.
        ValueError: If the file does not contain a JSON dictionary.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"name_or_folder must hold {CONFIG}; there is none in {folder}")
    return read_json(path)


def as_dictionary(config: object) -> dict[str, Json]:
    """Return a configuration as a dictionary.

    Args:
        config: Dictionary, configuration object of transformers, or path of `config.json` or its folder.
    """
    if isinstance(config, (str, PathLike)):
        path = Path(config)
        return read_json(path) if path.is_file() else read_config(path)
    if callable(to_dict := getattr(config, "to_dict", None)):
        config = to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a dictionary, a configuration of transformers or the path of {CONFIG}; "
            f"got {type(config).__name__}"
        )
    return dict(config)


def transformers_entries(config: Config) -> dict[str, Json]:
    """Return a copy of `config` without `num_bands` and `max_resolution`, which transformers does not have."""
    return {name: value for name, value in config.items() if name not in FOURIER}


def _expected_unless_valid(name: str, value: object, default: object) -> str:
    """Return "" if `value` is valid for the configuration option `name`, or a description of the valid values."""
    if value is None and default is None:
        return ""
    if name in CHOICES:
        known = any(type(value) is type(choice) and value == choice for choice in CHOICES[name])
        return "" if known else f"one of {CHOICES[name]}"
    if name == "attention_probs_dropout_prob":
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < 1.0
        return "" if number else "a number in [0, 1)"
    if name in LENGTHS:
        valid = isinstance(value, (list, tuple)) and len(value) == LENGTHS[name] and all(map(_is_size, value))
        return "" if valid else f"{LENGTHS[name]} whole numbers from 1 to {LARGEST}"
    smallest = SMALLEST.get(name, 1)
    return "" if _is_size(value, smallest) else f"a whole number from {smallest} to {LARGEST}"


def _is_size(value: object, smallest: int = 1) -> bool:
    return type(value) is int and smallest <= value <= LARGEST
