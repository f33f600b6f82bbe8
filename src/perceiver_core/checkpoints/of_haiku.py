"""Weights of DeepMind's own Perceiver IO checkpoints in our models.

Their names are translated to those of transformers (`haiku_names`), whose table (`of_transformers.names`) knows ours.
What a file says of its arrays is compared with what the model needs before any of them is made.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver_core.checkpoints import of_transformers
from perceiver_core.checkpoints.configuration import DEFAULTS
from perceiver_core.checkpoints.haiku_files import opened
from perceiver_core.checkpoints.haiku_names import STATE, laid_out, place_of
from perceiver_core.checkpoints.held import Held
from perceiver_core.checkpoints.published import DEEPMIND, Numerics
from perceiver_core.models import PerceiverIO

MULTIMODAL = "PerceiverForMultimodalAutoencoding"
# What shapes do not tell: heads of self-attends and of the read, how often the blocks are gone through.
HEADS = {
    "PerceiverForMaskedLM": (8, 8, 1),
    "PerceiverForOpticalFlow": (16, 1, 1),
    MULTIMODAL: (8, 1, 1),
}
IMAGE = (8, 1, 8)
# What a configuration of transformers says beside what models are made of.
BESIDE = {"architectures", "model_type", "id2label", "label2id", "layer_norm_eps", "initializer_range"}
BESIDE |= {"transformers_version", "torch_dtype", "dtype", "_name_or_path"}


def deepmind(path: str | PathLike[str], *, numerics: Numerics = DEEPMIND, **config: Any) -> PerceiverIO:
    """A model of DeepMind's published Perceiver IO code, with its weights.

    Args:
        path: a file of Haiku's parameters: an `.npz` of arrays named `scope/parameter`, or the published pickle, of
            which nothing but dictionaries and arrays is read. Its name does not matter.
        numerics: what the model computes; see `published.Numerics`.
        config: what shapes do not tell, by transformers' names, where it is not as published: numbers of heads,
            `num_blocks`, sizes of pictures.

    Returns:
        A model in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a name in `config` that transformers' configuration does not have.
        ValueError: a file that holds anything else, or parameters of another model.

    Example:
        >>> from perceiver_core.checkpoints import deepmind
        >>> model = deepmind("imagenet_fourier_position_encoding.pystate")  # doctest: +SKIP
    """
    return with_config(Path(path), numerics, config)[0]


def with_config(path: Path, numerics: Numerics, told: Mapping[str, Any]) -> tuple[PerceiverIO, dict[str, Any]]:
    """A model of DeepMind's code, and the configuration that transformers would have for it; see `deepmind`."""
    if unknown := sorted(told.keys() - DEFAULTS.keys() - BESIDE):
        raise TypeError(f"a configuration of Perceiver IO has no {unknown}; it has {sorted(DEFAULTS)}")
    numerics = numerics._replace(transposed=False)
    with opened(path) as arrays, _saying(path):
        places = _places(arrays)
        shapes = _all({place: _shape(place, arrays[name]) for place, name in places.items()})
        config = {**_config(shapes), **told}
        _check_names(shapes, config)
        with torch.device("meta"):
            model = of_transformers.build(config, numerics)
        of_transformers.fill(model, shapes, config, numerics)  # refuses what does not fit, before anything is read
        tensors = {place: laid_out(place, torch.from_numpy(arrays[name].read())) for place, name in places.items()}
        of_transformers.fill(model, _all(tensors), config, numerics)
    return model.eval(), config


@contextmanager
def _saying(path: Path) -> Iterator[None]:
    """Errors that say which file they are about."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} must hold all of a published Perceiver IO; it lacks {error}") from error
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def _places(arrays: Mapping[str, Held]) -> dict[str, str]:
    """The names in a file by what transformers calls them.

    Raises:
        ValueError: a name that no published model has, or two names for one place.
    """
    found: dict[str, str] = {}
    for name in arrays:
        if STATE.search(name):
            continue
        place = place_of(name)
        if place in found:
            raise ValueError(f"{found[place]} and {name} are the same parameter; leave one of them")
        found[place] = name
    if _kind(found) == MULTIMODAL:  # its label decoder's query stands where classifiers have theirs
        own = "decoder.output_position_encodings.position_embeddings"
        found[f"perceiver.decoder.modalities.label.{own}"] = found.pop(f"perceiver.decoder.{own}")
    _check_numbers({name: arrays[name] for name in found.values()})
    return found


def _check_numbers(arrays: Mapping[str, Held]) -> None:
    """Raises ValueError unless all are of one floating dtype, and none is empty."""
    first: tuple[str, str] | None = None
    for name, held in arrays.items():
        dtype = held.dtype.name  # whatever the order of its bytes
        if held.dtype.kind != "f":
            raise ValueError(f"{name} must be of floating point numbers; it is of {dtype}")
        if 0 in held.shape:
            raise ValueError(f"{name} must not be empty; its shape is {held.shape}")
        first = first or (name, dtype)
        if dtype != first[1]:
            raise ValueError(f"all parameters must be of one dtype; {first[0]} is of {first[1]}, {name} of {dtype}")


def _check_names(theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raises ValueError where `fill` would, before a model is built of as many layers as a file names."""
    places = of_transformers.names(config)
    missing, unknown = sorted(places.keys() - theirs.keys()), sorted(theirs.keys() - places.keys())
    if missing or unknown:
        raise ValueError(f"it must hold all of a published Perceiver IO; it lacks {missing[:5]}, and has {unknown[:5]}")


def _shape(place: str, held: Held) -> Tensor:
    """A tensor without values."""
    dtype = getattr(torch, held.dtype.name)
    return laid_out(place, torch.empty(held.shape, dtype=dtype, device="meta"))


def _all(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what PyTorch counts and Haiku does not."""
    if any(".batchnorm." in place for place in found):
        found["perceiver.input_preprocessor.convnet.batchnorm.num_batches_tracked"] = torch.tensor(0)
    return found


def _kind(theirs: Container[str]) -> str:
    """Which model parameters are of, by its input."""
    marks = {
        "embeddings.weight": "PerceiverForMaskedLM",
        "convnet_1x1.weight": "PerceiverForImageClassificationLearned",
        "convnet.conv.weight": "PerceiverForImageClassificationConvProcessing",
        "conv_after_patches.weight": "PerceiverForOpticalFlow",
        "mask.label": MULTIMODAL,
    }
    there = [kind for mark, kind in marks.items() if f"perceiver.input_preprocessor.{mark}" in theirs]
    return there[0] if there else "PerceiverForImageClassificationFourier"


def _config(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that shapes and the published sizes tell."""
    kind = _kind(theirs)
    heads, cross, blocks = HEADS.get(kind, IMAGE)
    latents, dim = _sizes(theirs, "perceiver.embeddings.latents", 2)
    own = "perceiver.encoder.self_attends"
    config = {
        "architectures": [kind],
        "num_latents": latents,
        "d_latents": dim,
        "num_blocks": blocks,
        "num_self_attends_per_block": sum(name.endswith("self.query.weight") and own in name for name in theirs),
        "num_self_attention_heads": heads,
        "num_cross_attention_heads": cross,
        "attention_probs_dropout_prob": 0.0,
        "self_attention_widening_factor": _sizes(theirs, f"{own}.0.mlp.dense1.weight", 2)[0] // dim,
    }
    read = "perceiver.encoder.cross_attention"
    config["cross_attention_widening_factor"] = _sizes(theirs, f"{read}.mlp.dense1.weight", 2)[0] // dim
    return config | _of_inputs(kind, theirs)


def _of_inputs(kind: str, theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    adapter, final = "perceiver.input_preprocessor", "perceiver.decoder.decoder.final_layer.weight"

    def rows(name: str) -> int:
        return _sizes(theirs, name, 2)[0]

    if kind == "PerceiverForMaskedLM":
        vocabulary, width = _sizes(theirs, f"{adapter}.embeddings.weight", 2)
        own = "perceiver.encoder.self_attends.0.attention.self"
        return {
            "vocab_size": vocabulary,
            "d_model": width,
            "max_position_embeddings": rows(f"{adapter}.position_embeddings.weight"),
            "qk_channels": rows(f"{own}.query.weight"),
            "v_channels": rows(f"{own}.value.weight"),
        }
    if kind == "PerceiverForImageClassificationLearned":
        points = rows(f"{adapter}.position_embeddings.position_embeddings")
        return {"image_size": round(points**0.5), "num_labels": rows(final)}
    if kind == MULTIMODAL:
        outputs = "perceiver.output_postprocessor.modalities"
        labels, patch = (rows(f"{outputs}.{of}.classifier.weight") for of in ("label", "audio"))
        return {"num_labels": labels, "samples_per_patch": patch, "output_num_channels": rows(final)}
    return {} if kind == "PerceiverForOpticalFlow" else {"num_labels": rows(final)}


def _sizes(theirs: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """The shape of a parameter, which has to have so many axes."""
    shape = tuple(theirs[name].shape)
    if len(shape) != axes:
        raise ValueError(f"{name} must have {axes} axes; its shape is {shape}")
    return shape
