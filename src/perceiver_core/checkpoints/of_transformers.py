"""Weights that transformers keeps, in our models, and back.

Every tensor of a file is used exactly once, under the name that `names` gives it here; files that hold others, or lack
some, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perceiver_core.checkpoints import hub
from perceiver_core.checkpoints.published import DEFAULTS, MODELS, TRANSFORMERS, Numerics
from perceiver_core.models import PerceiverIO

CONFIG, WEIGHTS, BINARY = "config.json", "model.safetensors", "pytorch_model.bin"
STEM = "perceiver.input_preprocessor.convnet.conv.weight"


def hugging_face(name_or_folder: str | PathLike[str], *, numerics: Numerics = TRANSFORMERS) -> PerceiverIO:
    """A model of transformers' Perceiver classes, with its weights.

    Args:
        name_or_folder: a folder that transformers wrote (`config.json`, and `model.safetensors` or
            `pytorch_model.bin`), or a name on the Hugging Face hub, for which huggingface_hub has to be installed.
        numerics: `published.TRANSFORMERS`, what transformers computes; `published.DEEPMIND`, what the weights were
            trained for; see `published.Numerics`.

    Returns:
        A model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or nothing to read in it.
        ValueError: another kind of model, or weights that are not its.

    Example:
        >>> from perceiver_core.checkpoints import hugging_face
        >>> model = hugging_face("deepmind/vision-perceiver-fourier")  # doctest: +SKIP
    """
    folder = hub.fetched(name_or_folder, (CONFIG, WEIGHTS, BINARY))
    config = read_config(folder)
    with torch.device("meta"):
        model = build(config, numerics)
    fill(model, _tensors(folder), config, numerics)
    return model.eval()


def to_hugging_face(
    model: nn.Module, folder: str | PathLike[str], *, config: Mapping[str, Any], numerics: Numerics = TRANSFORMERS
) -> Path:
    """Writes a model so that transformers loads it.

    Args:
        model: one that `hugging_face` gave, or `build`; trained since, maybe.
        folder: where to; made if it is not there.
        config: what `config.json` of the original holds, a dictionary: `read_config` reads it.
        numerics: those that the model was made with.

    Returns:
        The folder.

    Raises:
        ValueError: a model that is not of that configuration.

    Example:
        >>> import tempfile, torch
        >>> from perceiver_core.checkpoints import hugging_face, to_hugging_face
        >>> from perceiver_core.checkpoints.of_transformers import build
        >>> config = {"architectures": ["PerceiverForOpticalFlow"], "num_latents": 5, "d_latents": 16}
        >>> config |= {"num_self_attends_per_block": 1, "num_cross_attention_heads": 1, "train_size": [6, 8]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = hugging_face(to_hugging_face(build(config), folder, config=config))
        >>> again(torch.rand(1, 2, 3, 6, 8)).shape
        torch.Size([1, 2, 6, 8])
    """
    folder = Path(folder)
    ours = dict(model.state_dict())
    theirs = {}
    for name, place in names(config).items():
        if place not in ours:
            raise ValueError(f"model must be of the configuration's kind, {_kind(config)}; it has no {place}")
        theirs[name] = _as_theirs(name, ours.pop(place), numerics).detach().cpu().contiguous().clone()
    if more := ours.keys() - set(names(config).values()) - _aliases(config):
        raise ValueError(f"model must be of the configuration's kind, {_kind(config)}; it also has {sorted(more)[:5]}")
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f"{WEIGHTS}.partial", folder / f"{CONFIG}.partial"
    save_file(theirs, weights, {"format": "pt"})
    text.write_text(json.dumps(dict(config), indent=2) + "\n")
    weights.replace(folder / WEIGHTS)
    text.replace(folder / CONFIG)
    return folder


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """What `config.json` in a folder says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a dictionary.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"name_or_folder must hold {CONFIG}; there is none in {folder}")
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a dictionary; got {type(config).__name__}")
    return config


def build(config: Mapping[str, Any], numerics: Numerics = TRANSFORMERS) -> PerceiverIO:
    """The model of a configuration, with weights of its own."""
    return MODELS[_kind(config)](_filled_in(config), numerics)


def _kind(config: Mapping[str, Any]) -> str:
    kinds = config.get("architectures") or []
    if len(kinds) != 1 or kinds[0] not in MODELS:
        raise ValueError(f"config must name one of {list(MODELS)} as its architecture; got {kinds}")
    return str(kinds[0])


def _filled_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of transformers for what is not said."""
    labels = {} if "num_labels" in config or "id2label" not in config else {"num_labels": len(config["id2label"])}
    found = {**DEFAULTS, **config, **labels}
    if found["hidden_act"] != "gelu":
        raise ValueError(f"config must have hidden_act gelu, as all published models; got {found['hidden_act']!r}")
    return found


def names(config: Mapping[str, Any]) -> dict[str, str]:
    """What each tensor of transformers is called here."""
    kind, adapter, decoder = _kind(config), "perceiver.input_preprocessor", "perceiver.decoder"
    found = {"perceiver.embeddings.latents": "encoder.latents"}
    _layer(found, "perceiver.encoder.cross_attention", "encoder.reads.0", cross=True)
    for i in range(_filled_in(config)["num_self_attends_per_block"]):
        _layer(found, f"perceiver.encoder.self_attends.{i}", f"encoder.transformers.0.blocks.{i}")
    if kind in INPUTS:
        INPUTS[kind](found, adapter)
    if kind == "PerceiverForMaskedLM":
        found["embedding_decoder.bias"] = "head.bias"
    else:
        decoder += ".decoder"
        _linear(found, f"{decoder}.final_layer", "decoder.output")
    if kind == "PerceiverForMultimodalAutoencoding":
        _multimodal(found, adapter, "perceiver.decoder")
    elif kind != "PerceiverForOpticalFlow":
        found[f"{decoder}.output_position_encodings.position_embeddings"] = "queries.vectors"
    _layer(found, f"{decoder}.decoding_cross_attention", "decoder.read", cross=True)
    return found


Names: TypeAlias = dict[str, str]


def _of_text(found: Names, adapter: str) -> None:
    found[f"{adapter}.embeddings.weight"] = "adapter.vectors"
    found[f"{adapter}.position_embeddings.weight"] = "adapter.positions.vectors"


def _of_learned(found: Names, adapter: str) -> None:
    _linear(found, f"{adapter}.convnet_1x1", "adapter.stem.convolution")
    _linear(found, f"{adapter}.positions_projection", "adapter.positions.project")
    found[f"{adapter}.position_embeddings.position_embeddings"] = "adapter.positions.positions.vectors"


def _of_stem(found: Names, adapter: str) -> None:
    found[STEM] = "adapter.stem.convolution.weight"
    for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        found[f"{adapter}.convnet.batchnorm.{part}"] = f"adapter.stem.norm.{part}"


def _of_flow(found: Names, adapter: str) -> None:
    _linear(found, f"{adapter}.conv_after_patches", "adapter.project")


INPUTS: dict[str, Callable[[Names, str], None]] = {
    "PerceiverForMaskedLM": _of_text,
    "PerceiverForSequenceClassification": _of_text,
    "PerceiverForImageClassificationLearned": _of_learned,
    "PerceiverForImageClassificationConvProcessing": _of_stem,
    "PerceiverForOpticalFlow": _of_flow,
}


def _multimodal(found: dict[str, str], adapter: str, decoder: str) -> None:
    for kind in ("audio", "image", "label"):
        found[f"{adapter}.padding.{kind}"] = f"adapter.padding.{kind}"
        found[f"{adapter}.mask.{kind}"] = f"adapter.hidden.{kind}"
        found[f"{decoder}.padding.{kind}"] = f"queries.padding.{kind}"
    label = f"{decoder}.modalities.label.decoder.output_position_encodings.position_embeddings"
    found[label] = "queries.sources.label.vectors"
    outputs = "perceiver.output_postprocessor.modalities"
    _linear(found, f"{outputs}.audio.classifier", "head.heads.audio.samples")
    _linear(found, f"{outputs}.image.classifier", "head.heads.image.values")
    _linear(found, f"{outputs}.label.classifier", "head.heads.label.head.values")


def _layer(found: dict[str, str], theirs: str, ours: str, *, cross: bool = False) -> None:
    own = f"{theirs}.attention.self"
    _linear(found, f"{own}.layernorm1", f"{ours}.query_norm" if cross else f"{ours}.norm")
    if cross:
        _linear(found, f"{own}.layernorm2", f"{ours}.input_norm")
    for part in ("query", "key", "value"):
        _linear(found, f"{own}.{part}", f"{ours}.attention.{part}")
    _linear(found, f"{theirs}.attention.output.dense", f"{ours}.attention.output")
    _linear(found, f"{theirs}.layernorm", f"{ours}.mlp_norm")
    _linear(found, f"{theirs}.mlp.dense1", f"{ours}.mlp.expand")
    _linear(found, f"{theirs}.mlp.dense2", f"{ours}.mlp.contract")


def _linear(found: dict[str, str], theirs: str, ours: str) -> None:
    found.update({f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")})


def _aliases(config: Mapping[str, Any]) -> set[str]:
    """Other names of tensors that stand under one already."""
    return {"head.vectors"} if _kind(config) == "PerceiverForMaskedLM" else set()


def fill(model: nn.Module, theirs: Mapping[str, Tensor], config: Mapping[str, Any], numerics: Numerics) -> None:
    """Gives a model the tensors of a file.

    Raises:
        ValueError: tensors that are missing, of another shape, or that there is no place for.
    """
    places = names(config)
    missing, unknown = sorted(places.keys() - theirs.keys()), sorted(theirs.keys() - places.keys())
    if missing or unknown:
        raise ValueError(f"the weights are not those of {_kind(config)}: missing {missing[:5]}, unknown {unknown[:5]}")
    wanted = model.state_dict()
    found = {}
    for name, place in places.items():
        tensor = _turned(name, theirs[name], numerics)
        tensor = tensor.reshape(wanted[place].shape) if _same_but_axes(tensor, wanted[place]) else tensor
        if tensor.shape != wanted[place].shape:
            raise ValueError(f"{name} must have shape {tuple(wanted[place].shape)}; got {tuple(theirs[name].shape)}")
        found[place] = tensor.clone()
    for alias in _aliases(config):
        found[alias] = found["adapter.vectors"]
    model.load_state_dict(found, assign=True)
    _tie(model, config)


def _as_theirs(name: str, tensor: Tensor, numerics: Numerics) -> Tensor:
    """A tensor in the shape in which transformers keeps it."""
    if name.endswith("position_embeddings.position_embeddings"):
        return tensor.flatten(0, -2)
    if ".padding." in name or ".mask." in name:
        return tensor[None]
    return _turned(name, tensor, numerics)


def _turned(name: str, tensor: Tensor, numerics: Numerics) -> Tensor:
    """The stem's kernel with rows and columns changed about, where they are."""
    return tensor.mT if name == STEM and numerics.transposed else tensor


def _same_but_axes(one: Tensor, other: Tensor) -> bool:
    """Whether two shapes differ in how axes are put together: positions of a grid, vectors with an axis of one."""
    return one.numel() == other.numel() and one.shape[-1:] == other.shape[-1:]


def _tie(model: Any, config: Mapping[str, Any]) -> None:
    if _kind(config) == "PerceiverForMaskedLM":
        model.head.vectors = model.adapter.vectors


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        try:
            return load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}. Copy it again") from error
    binary = folder / BINARY
    if not binary.is_file():
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS} or pytorch_model.bin; there is neither")
    try:
        found = torch.load(binary, map_location="cpu", weights_only=True)  # tensors, and nothing that executes
    except Exception as error:  # of many kinds, pickle's own among them
        raise ValueError(f"{binary} is not a whole file of tensors alone: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{binary} must hold a dictionary of tensors")
    return found
