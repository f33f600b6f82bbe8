"""What transformers' configuration of a Perceiver may say, and what holds where it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS = {
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
LISTS = {"train_size": 2, "output_shape": 4}  # how many sizes
CHOICES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "silu", "swish"),
    "cross_attention_shape_for_attention": ("kv", "q"),
    "use_query_residual": (True, False),
}
LARGEST = 2**31 - 1
LEAST = {"num_self_attends_per_block": 0}  # 1 unless it stands here


def filled_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of transformers for what is not said.

    Raises:
        ValueError: a value of another type, or none of those that there are.

    Example:
        >>> from perceiver_core.checkpoints.configuration import filled_in
        >>> filled_in({"id2label": {"0": "cat", "1": "dog", "2": "owl"}})["num_labels"]
        3
    """
    found = {**DEFAULTS, **config}
    if (labels := config.get("id2label")) is not None:
        if not isinstance(labels, Mapping) or not labels:
            raise ValueError(f"config must have id2label as a dictionary of labels; got {labels!r:.60}")
        found["num_labels"] = len(labels)
    for name in DEFAULTS:
        if trouble := _trouble(name, found[name]):
            raise ValueError(f"config must have {name} as {trouble}; got {found[name]!r:.60}")
    return found


def _trouble(name: str, value: Any) -> str:
    """What a value should be; empty if it is that."""
    if name in CHOICES:
        known = any(type(value) is type(choice) and value == choice for choice in CHOICES[name])
        return "" if known else f"one of {CHOICES[name]}"
    if name == "attention_probs_dropout_prob":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number and 0.0 <= value < 1.0 else "a number in [0, 1)"
    if name in LISTS:
        fits = isinstance(value, (list, tuple)) and len(value) == LISTS[name] and all(map(_is_size, value))
        return "" if fits else f"{LISTS[name]} whole numbers from 1 to {LARGEST}"
    if value is None and DEFAULTS[name] is None:
        return ""
    least = LEAST.get(name, 1)
    return "" if _is_size(value, least) else f"a whole number from {least} to {LARGEST}"


def _is_size(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= LARGEST
