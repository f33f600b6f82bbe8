"""Weights of DeepMind's own Perceiver IO checkpoints: Haiku's names and layouts, in our models.

Their names are translated to those of transformers, whose table (`of_transformers.names`) knows ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perceiver_core.checkpoints import of_transformers, restricted
from perceiver_core.checkpoints.published import DEEPMIND, Numerics
from perceiver_core.models import PerceiverIO

# Scopes and parameters as Haiku names them, and what transformers calls them. The first that fits is taken.
SCOPES = [
    (r"^embed/embeddings$", "input_preprocessor.embeddings.weight"),
    (r"^trainable_position_encoding/pos_embs$", "input_preprocessor.position_embeddings.weight"),
    (r"^image_preprocessor/~/conv2_d/", "input_preprocessor.convnet_1x1."),
    (
        r"^image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs$",
        "input_preprocessor.position_embeddings.position_embeddings",
    ),
    (
        r"^image_preprocessor/~_build_network_inputs/position_encoding_projector/linear/",
        "input_preprocessor.positions_projection.",
    ),
    (r"^image_preprocessor/~/conv2_d_downsample/~/conv/", "input_preprocessor.convnet.conv."),
    (
        r"^image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/mean_ema/average$",
        "input_preprocessor.convnet.batchnorm.running_mean",
    ),
    (
        r"^image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/var_ema/average$",
        "input_preprocessor.convnet.batchnorm.running_var",
    ),
    (r"^image_preprocessor/~/conv2_d_downsample/~/batchnorm/", "input_preprocessor.convnet.batchnorm."),
    (r"^image_preprocessor/patches_linear/", "input_preprocessor.conv_after_patches."),
    (r"^multimodal_preprocessor/(\w+)_mask_token/pos_embs$", r"input_preprocessor.mask.\1"),
    (r"^multimodal_preprocessor/(\w+)_padding/pos_embs$", r"input_preprocessor.padding.\1"),
    (r"^multimodal_decoder/~decoder_query/(\w+)_padding/pos_embs$", r"decoder.padding.\1"),
    (r"^(?:multimodal|flow|classification)_decoder/~/basic_decoder/output/", "decoder.decoder.final_layer."),
    (
        r"^(?:multimodal|flow|classification)_decoder/~/basic_decoder/cross_attention/",
        "decoder.decoder.decoding_cross_attention/",
    ),
    (
        r"^classification_decoder/~/basic_decoder/~/trainable_position_encoding/pos_embs$",
        "decoder.decoder.output_position_encodings.position_embeddings",
    ),
    (
        r"^basic_decoder/~/trainable_position_encoding/pos_embs$",
        "decoder.output_position_encodings.position_embeddings",
    ),
    (r"^basic_decoder/cross_attention/", "decoder.decoding_cross_attention/"),
    (r"^embedding_decoder/bias$", "embedding_decoder.bias"),
    (r"^projection_postprocessor/linear/", "output_postprocessor.modalities.image.classifier."),
    (r"^classification_postprocessor/linear/", "output_postprocessor.modalities.label.classifier."),
    (r"^audio_postprocessor/linear/", "output_postprocessor.modalities.audio.classifier."),
    (r"^(?:perceiver_)?encoder/~/trainable_position_encoding/pos_embs$", "embeddings.latents"),
    (r"^(?:perceiver_)?encoder/~/cross_attention/", "encoder.cross_attention/"),
    (r"^(?:perceiver_)?encoder/~/self_attention/", "encoder.self_attends.0/"),
    (r"^(?:perceiver_)?encoder/~/self_attention_(\d+)/", r"encoder.self_attends.\1/"),
]
LAYERS = {
    "attention/linear": "attention.self.query",
    "attention/linear_1": "attention.self.key",
    "attention/linear_2": "attention.self.value",
    "attention/linear_3": "attention.output.dense",
    "mlp/linear": "mlp.dense1",
    "mlp/linear_1": "mlp.dense2",
}
CROSS = {"layer_norm": "attention.self.layernorm1", "layer_norm_1": "attention.self.layernorm2"}
CROSS |= {"layer_norm_2": "layernorm"}
SELF = {"layer_norm": "attention.self.layernorm1", "layer_norm_1": "layernorm"}
PARTS = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias"}
STATE = re.compile(r"/~/(mean|var)_ema/(hidden|counter)$")  # of a running mean while it is computed

# What shapes do not tell: heads of self-attends and of the read, how often the blocks are gone through.
HEADS = {
    "PerceiverForMaskedLM": (8, 8, 1),
    "PerceiverForOpticalFlow": (16, 1, 1),
    "PerceiverForMultimodalAutoencoding": (8, 1, 1),
}
IMAGE = (8, 1, 8)


def deepmind(path: str | PathLike[str], *, numerics: Numerics = DEEPMIND, **config: Any) -> PerceiverIO:
    """A model of DeepMind's published Perceiver IO code, with its weights.

    Args:
        path: a file of Haiku's parameters: an `.npz` of arrays named `scope/parameter`, or the published pickle, of
            which nothing but dictionaries and arrays is read.
        numerics: what the model computes; see `published.Numerics`.
        config: what shapes do not tell, by transformers' names, where it is not as published: numbers of heads,
            `num_blocks`, sizes of pictures.

    Returns:
        A model in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds anything else, or parameters of another model.

    Example:
        >>> from perceiver_core.checkpoints import deepmind
        >>> model = deepmind("imagenet_fourier_position_encoding.pystate")  # doctest: +SKIP
    """
    return with_config(Path(path), numerics, config)[0]


def with_config(path: Path, numerics: Numerics, told: Mapping[str, Any]) -> tuple[PerceiverIO, dict[str, Any]]:
    """A model of DeepMind's code, and the configuration that transformers would have for it; see `deepmind`."""
    theirs = translated(_arrays(path))
    try:
        config = {**_config(theirs), **told}
    except KeyError as error:
        raise ValueError(f"{path} must hold all of a published Perceiver IO; it lacks {error}") from error
    with torch.device("meta"):
        model = of_transformers.build(config, numerics)
    of_transformers.fill(model, theirs, config, numerics._replace(transposed=False))
    return model.eval(), config


def translated(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Haiku's parameters under the names and in the layouts of transformers.

    Args:
        arrays: by `scope/parameter`.

    Raises:
        ValueError: a name that no published model has.
    """
    found = {}
    for name, array in arrays.items():
        if STATE.search(name):
            continue
        place = _name(name)
        found[place] = _laid_out(place, torch.from_numpy(np.ascontiguousarray(array)))
    if any(".batchnorm." in place for place in found):
        found["perceiver.input_preprocessor.convnet.batchnorm.num_batches_tracked"] = torch.tensor(0)
    return found


def _name(name: str) -> str:
    for pattern, place in SCOPES:
        new, count = re.subn(pattern, place, name)
        if not count:
            continue
        if "attention/" in new or "self_attends" in new:
            new = _of_layer(new)
        head, _, part = new.rpartition(".")
        full = f"{head}.{PARTS.get(part, part)}"
        if name.startswith("classification_decoder") and full.endswith("position_embeddings"):
            return f"perceiver.{full}"
        return full if full.startswith("embedding_decoder") else f"perceiver.{full}"
    raise ValueError(f"{name} is no parameter of a published Perceiver IO")


def _of_layer(name: str) -> str:
    """`block/scope/parameter` of an attention layer."""
    block, _, rest = name.partition("/")
    scope, _, part = rest.rpartition("/")
    known = LAYERS | (SELF if "self_attends" in block else CROSS)
    if scope not in known:
        raise ValueError(f"{name} is no parameter of a published Perceiver IO")
    return f"{block}.{known[scope]}.{part}"


def _laid_out(place: str, tensor: Tensor) -> Tensor:
    """Matrices `in out` and kernels `h w in out` as PyTorch has them; statistics without axes of one."""
    if ".batchnorm." in place:
        return tensor.flatten()
    if not place.endswith("weight") or "embeddings" in place:
        return tensor
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.mT if tensor.ndim == 2 else tensor


def _kind(theirs: Mapping[str, Tensor]) -> str:
    """Which model parameters are of, by its input."""
    marks = {
        "embeddings.weight": "PerceiverForMaskedLM",
        "convnet_1x1.weight": "PerceiverForImageClassificationLearned",
        "convnet.conv.weight": "PerceiverForImageClassificationConvProcessing",
        "conv_after_patches.weight": "PerceiverForOpticalFlow",
        "mask.label": "PerceiverForMultimodalAutoencoding",
    }
    there = [kind for mark, kind in marks.items() if f"perceiver.input_preprocessor.{mark}" in theirs]
    return there[0] if there else "PerceiverForImageClassificationFourier"


def _config(theirs: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration that shapes and the published sizes tell."""
    kind = _kind(theirs)
    if kind == "PerceiverForMultimodalAutoencoding":  # its label decoder's query stands where classifiers have theirs
        label = theirs.pop("perceiver.decoder.decoder.output_position_encodings.position_embeddings")
        theirs["perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings"] = label
    heads, cross, blocks = HEADS.get(kind, IMAGE)
    latents, dim = theirs["perceiver.embeddings.latents"].shape
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
        "self_attention_widening_factor": len(theirs[f"{own}.0.mlp.dense1.weight"]) // dim,
    }
    read = "perceiver.encoder.cross_attention"
    config["cross_attention_widening_factor"] = len(theirs[f"{read}.mlp.dense1.weight"]) // dim
    return config | _of_inputs(kind, theirs)


def _of_inputs(kind: str, theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    adapter, final = "perceiver.input_preprocessor", "perceiver.decoder.decoder.final_layer.weight"
    if kind == "PerceiverForMaskedLM":
        vocabulary, width = theirs[f"{adapter}.embeddings.weight"].shape
        own = "perceiver.encoder.self_attends.0.attention.self"
        return {
            "vocab_size": vocabulary,
            "d_model": width,
            "max_position_embeddings": len(theirs[f"{adapter}.position_embeddings.weight"]),
            "qk_channels": len(theirs[f"{own}.query.weight"]),
            "v_channels": len(theirs[f"{own}.value.weight"]),
        }
    if kind == "PerceiverForImageClassificationLearned":
        points = len(theirs[f"{adapter}.position_embeddings.position_embeddings"])
        return {"image_size": round(points**0.5), "num_labels": len(theirs[final])}
    if kind == "PerceiverForMultimodalAutoencoding":
        outputs = "perceiver.output_postprocessor.modalities"
        labels = len(theirs[f"{outputs}.label.classifier.weight"])
        patch = len(theirs[f"{outputs}.audio.classifier.weight"])
        return {"num_labels": labels, "samples_per_patch": patch, "output_num_channels": len(theirs[final])}
    return {} if kind == "PerceiverForOpticalFlow" else {"num_labels": len(theirs[final])}


def _arrays(path: Path) -> dict[str, Any]:
    """All arrays of a file by `scope/parameter`."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of Haiku's parameters; there is none at {path}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    found = restricted.read(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a dictionary; it holds a {type(found).__name__}")
    flat: dict[str, Any] = {}
    for part in (found["params"], found.get("state", {})) if "params" in found else (found,):
        for scope, parameters in part.items():
            if not isinstance(parameters, Mapping):
                raise ValueError(f"{path} must hold parameters by scope; {scope} is a {type(parameters).__name__}")
            flat |= {f"{scope}/{name}": array for name, array in parameters.items()}
    return flat
