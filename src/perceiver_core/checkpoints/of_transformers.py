"""Weights that transformers keeps, in our models, and back.

Every tensor of a file is used exactly once, under the name that `names` gives it here; files that hold others, or lack
some, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perceiver_core import registry
from perceiver_core.checkpoints.configuration import filled_in
from perceiver_core.checkpoints.differences import model_differences, spec_differences
from perceiver_core.checkpoints.files import CONFIG, WEIGHTS, fetched, read_json, weights_in
from perceiver_core.checkpoints.folder import write_atomically
from perceiver_core.checkpoints.published import ACTIVATIONS, MODELS, TRANSFORMERS, Numerics
from perceiver_core.checkpoints.state import TensorSpecs, check_values, state_tensors, tensor_specs
from perceiver_core.models import PerceiverIO

STEM = "perceiver.input_preprocessor.convnet.conv.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def hugging_face(name_or_folder: str | PathLike[str], *, numerics: Numerics = TRANSFORMERS) -> PerceiverIO:
    """A model of transformers' Perceiver classes, with its weights.

    What the configuration asks for is held against the weights before a model is made.

    Args:
        name_or_folder: a folder that transformers wrote (`config.json`, and `model.safetensors` or
            `pytorch_model.bin`, either in one file or in several with an index), or a name on the Hugging Face hub, for
            which huggingface_hub has to be installed.
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
    folder = fetched(name_or_folder)
    config = read_config(folder)
    with _named(folder / CONFIG):
        depth = _filled_in(config)["num_self_attends_per_block"]
    weights = weights_in(folder)
    with _named(weights.path):
        if depth > len(weights.kinds):
            raise ValueError(f"{CONFIG} has num_self_attends_per_block={depth}; there are {len(weights.kinds)} weights")
        _check_names(config, weights.kinds)
    with _named(folder / CONFIG), torch.device("meta"):
        model = build(config, numerics)
    with _named(weights.path):
        _check_kinds(model, config, weights.kinds)
        fill(model, weights.read(), config, numerics)
    return model.eval()


def to_hugging_face(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    config: Any,
    numerics: Numerics = TRANSFORMERS,
) -> Path:
    """Writes a model so that transformers loads it, and computes the same.

    Args:
        model: one that `hugging_face` gave, or `build`; trained since, maybe.
        folder: where to; made if it is not there. What is there is replaced as `save` does it.
        config: what `config.json` of the original holds: a dictionary, a configuration of transformers, or the path of
            that file or its folder. The activation and the dtype are written as the model has them.
        numerics: those that the model was made with.

    Returns:
        The folder.

    Raises:
        ValueError: a model that is not of that configuration, or one that transformers has no word for, as are
            DeepMind's numerics of two image classifiers. Nothing is written then.

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
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    folder, config = Path(folder), _as_dictionary(config)
    _check_described(model, config, numerics)
    state = state_tensors(model)
    check_values(state)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise ValueError(
            f"model must have weights of one floating point dtype; got {sorted(map(str, dtypes))}. "
            "Convert it: model.float()"
        )
    theirs = {name: _as_theirs(name, state[place], numerics) for name, place in names(config).items()}
    theirs = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in theirs.items()}
    written = _as_transformers_computes(config, numerics) | {"dtype": str(dtypes.pop()).removeprefix("torch.")}
    try:
        text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must hold what JSON has words for: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        {
            folder / WEIGHTS: lambda path: save_file(theirs, path, {"format": "pt"}),
            folder / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )
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
    return read_json(path)


def build(config: Mapping[str, Any], numerics: Numerics = TRANSFORMERS) -> PerceiverIO:
    """The model of a configuration, with weights of its own.

    Raises:
        ValueError: a configuration of nothing that there is.
    """
    kind, told = _kind(config), _filled_in(config)
    try:
        return MODELS[kind](told, numerics)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"config makes no {kind}: {error}") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says in an error which file it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_dictionary(config: Any) -> dict[str, Any]:
    """What a configuration says, whatever it comes as."""
    if isinstance(config, (str, PathLike)):
        path = Path(config)
        return read_config(path) if path.is_dir() or not path.exists() else read_json(path)
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a dictionary, a configuration of transformers or the path of {CONFIG}; "
            f"got {type(config).__name__}"
        )
    return dict(config)


def _check_described(model: nn.Module, config: Mapping[str, Any], numerics: Numerics) -> None:
    """Raises ValueError unless a configuration makes this model, here and in transformers."""
    with torch.device("meta"):
        made, theirs = build(config, numerics), build(_as_transformers_computes(config, numerics))
    wanted, found = registry.to_config(made), registry.to_config(model)
    different = _difference(wanted, found) or model_differences(made, model)
    different = different or spec_differences(tensor_specs(state_tensors(made)), tensor_specs(state_tensors(model)))
    if different:
        raise ValueError(
            f"model must be the {_kind(config)} that config and numerics make: {different}. Give what it was made with"
        )
    different = _difference(registry.to_config(theirs), found)
    if not different and numerics.transposed and STEM in names(config):
        different = "the kernel of its stem is turned"
    if different:
        raise ValueError(
            f"transformers has no word for what this model computes: {different}. Load the original with "
            "numerics=published.TRANSFORMERS to write what transformers computes"
        )


def _as_transformers_computes(config: Mapping[str, Any], numerics: Numerics) -> dict[str, Any]:
    """A configuration that says of a choice of numerics what transformers has words for."""
    written = {"model_type": "perceiver", **config}
    written.pop("torch_dtype", None)  # its name before it was dtype
    if _filled_in(config)["hidden_act"] == "gelu":
        told, known = registry.to_config(numerics.activation), {"gelu": TRANSFORMERS.activation, **ACTIVATIONS}
        found = [name for name, activation in known.items() if registry.to_config(activation) == told]
        written["hidden_act"] = (found or ["gelu"])[0]
    return written


def _difference(wanted: Any, found: Any, at: str = "") -> str:
    """The first difference between two descriptions, in words; empty if there is none."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        inside = (_difference(wanted[key], found[key], f"{at}.{key}".lstrip(".")) for key in wanted)
        return next(filter(None, inside), "")
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return _difference(dict(enumerate(wanted)), dict(enumerate(found)), at)
    return "" if wanted == found else f"{at or 'it'} is {_short(found)}, not {_short(wanted)}"


def _short(description: Any) -> str:
    if isinstance(description, dict) and len(description) > 1:
        first = next((description[kind] for kind in ("part", "partial") if kind in description), None)
        return f"{first or 'a dictionary'} of {sorted(description.keys() - {'part', 'partial'})}"
    return f"{description!r:.80}"


def _kind(config: Mapping[str, Any]) -> str:
    kinds = config.get("architectures")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != 1 or kinds[0] not in list(MODELS):
        ours = (
            ". It is one of perceiver_core.save: give it to load" if config.get("library") == "perceiver_core" else ""
        )
        raise ValueError(
            f"config must name one of {list(MODELS)} as its architectures, in a list; got {kinds!r:.80}{ours}"
        )
    return str(kinds[0])


def _filled_in(config: Mapping[str, Any]) -> dict[str, Any]:
    _kind(config)
    return filled_in(config)


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
    _layer(found, f"{decoder}.decoding_cross_attention", "decoder.cross_attention", cross=True)
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
        ValueError: tensors that are missing, of another shape or dtype, or that there is no place for.
    """
    kinds = tensor_specs(dict(theirs))
    _check_names(config, kinds)
    _check_kinds(model, config, kinds)
    wanted = model.state_dict()
    found = {
        place: _turned(name, theirs[name], numerics).detach().reshape(wanted[place].shape).clone()
        for name, place in names(config).items()
    }
    for alias in _aliases(config):
        found[alias] = found["adapter.vectors"]
    model.load_state_dict(found, assign=True)
    _tie(model, config)


def _check_names(config: Mapping[str, Any], found: TensorSpecs) -> None:
    """Raises ValueError unless a file has the names of a configuration's weights, all of them and no others."""
    places = names(config)
    missing, unknown = sorted(places.keys() - found.keys()), sorted(found.keys() - places.keys())
    if missing or unknown:
        marked = bool(found) and all(name.startswith("module.") for name in found)
        hint = ". Take off the module. at the start of all names, which DataParallel puts there" if marked else ""
        raise ValueError(
            f"the weights are not those of {_kind(config)}: missing {missing[:5]}, unknown {unknown[:5]}{hint}"
        )


def _check_kinds(model: nn.Module, config: Mapping[str, Any], found: TensorSpecs) -> None:
    """Raises ValueError unless weights have the shapes of a model's in transformers, and one dtype."""
    state = model.state_dict()
    first = ""
    for name, place in names(config).items():
        shape, dtype = found[name]
        wanted = _as_theirs(name, torch.empty_like(state[place], device="meta"), TRANSFORMERS)
        if shape != wanted.shape:
            raise ValueError(f"{name} must have shape {tuple(wanted.shape)}; got {shape}")
        if not wanted.is_floating_point():
            if dtype != wanted.dtype:
                raise ValueError(f"{name} must be of {wanted.dtype}; got {dtype}")
            continue
        first = first or name
        if dtype not in FLOATS:
            raise ValueError(f"{name} must be of a floating point dtype, one of {FLOATS}; got {dtype}")
        if dtype != found[first][1]:
            raise ValueError(
                f"{name} must be of the dtype of the other weights, {found[first][1]} ({first}); got {dtype}. "
                "Convert them to one"
            )


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


def _tie(model: Any, config: Mapping[str, Any]) -> None:
    if _kind(config) == "PerceiverForMaskedLM":
        model.head.vectors = model.adapter.vectors
