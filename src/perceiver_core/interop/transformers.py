"""Loading and saving of Perceiver models in the format of transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perceiver_core import registry
from perceiver_core.atomic_files import make_folder, write_atomically
from perceiver_core.checkpoints.folder import CONFIG, WEIGHTS
from perceiver_core.checkpoints.state import (
    check_values,
    model_differences,
    spec_differences,
    state_tensors,
    tensor_specs,
)
from perceiver_core.error_messages import errors_with_path, printable_errors
from perceiver_core.interop import transformers_config as configs
from perceiver_core.interop.published_models import TRANSFORMERS_NUMERICS, Numerics, build
from perceiver_core.interop.published_weights import from_transformers, load_weights
from perceiver_core.interop.transformers_config import Config
from perceiver_core.interop.weight_files import state_dict_files as files
from perceiver_core.interop.weight_files.weight_checks import FLOATS, check_floats
from perceiver_core.models import PerceiverIO

DIGEST = "perceiver_core_sha256"  # key in the metadata of the weights
TRAINING_ONLY = "attention_probs_dropout_prob"


@printable_errors()
def load_transformers(
    name_or_folder: str | PathLike[str], *, numerics: Numerics = TRANSFORMERS_NUMERICS
) -> PerceiverIO:
    """Load a Perceiver model saved by transformers.

    Weight names and shapes are checked against the configuration. In safetensors files, this reads only the headers.

    Args:
        name_or_folder: Folder with `config.json` and the weights, or name of a model on the Hugging Face Hub
            (`owner/name`). The weights are in `model.safetensors` or `pytorch_model.bin`, or in shards with an index.
            Downloads require huggingface_hub.
        numerics: `interop.TRANSFORMERS_NUMERICS` to reproduce the outputs of transformers, or
            `interop.DEEPMIND_NUMERICS` to reproduce the outputs of DeepMind's code, which trained the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder does not exist, or if one of its files is missing.
        FileNotFoundError: If the model is on the Hugging Face Hub and huggingface_hub is not installed.
        ValueError: If the architecture is not one of the seven published ones.
        ValueError: If a file is damaged, or the weights do not match the configuration.
        ValueError: If the weights do not have the same floating-point dtype, or are not finite.

    Example:
        >>> model = pc.interop.load_transformers("deepmind/vision-perceiver-fourier")  # doctest: +SKIP
    """
    folder = files.fetch(name_or_folder)
    with errors_with_path(folder / CONFIG):
        config = configs.complete(configs.transformers_entries(configs.read_config(folder)))
    weights = files.open_folder(folder)
    with errors_with_path(weights.path):
        depth, number = config["num_self_attends_per_block"], len(weights.headers)
        if depth > number:
            raise ValueError(f"{CONFIG} has num_self_attends_per_block={depth}; there are {number} weights")
        mapping = from_transformers(config, transposed_stem=numerics.transposed_stem)
        mapping.check(weights.headers)
        check_floats(weights.headers)
    with errors_with_path(folder / CONFIG), torch.device("meta"):
        model = build(config, numerics)

    def read() -> dict[str, Tensor]:
        tensors = weights.read()
        if weights.metadata.get(DIGEST, "") not in ("", _digest(config, tensors)):
            raise ValueError(
                f"it is damaged, or {CONFIG} is not the one that save_transformers wrote with it. Copy both files from "
                "one folder, or save the model again. If you changed one of them on purpose, write the weights again "
                "by safetensors.torch.save_file"
            )
        return tensors

    with errors_with_path(weights.path):
        load_weights(model, mapping, weights.headers, read)
    return model


@printable_errors()
def save_transformers(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    config: object,
    numerics: Numerics = TRANSFORMERS_NUMERICS,
) -> Path:
    """Save a model so that transformers can load it and compute the same outputs.

    If the model cannot be saved, no file is written.

    Args:
        model: Model from `load_transformers` or `load_haiku`, possibly trained further.
        folder: Folder to write to, created if it does not exist. Existing files are replaced only after both new files
            are complete. A digest in the weights shows whether both files are of one save, for example after a crash.
        config: Configuration of the original model: a dictionary, a configuration object of transformers, or the path
            of `config.json` or its folder. The activation and the dtype are set to those of the model.
        numerics: Numerics that the model was loaded with.

    Returns:
        Path of the folder.

    Raises:
        ValueError: If `config` and `numerics` do not describe the model.
        ValueError: If transformers cannot compute the same outputs. This is the case for the image classifiers with
            learned positions or a convolutional stem, if they were loaded with `DEEPMIND_NUMERICS`.
        ValueError: If the weights do not all have the same floating-point dtype.

    Example:
        >>> import tempfile, torch
        >>> from perceiver_core.interop.published_models import build
        >>> config = {"architectures": ["PerceiverForOpticalFlow"], "num_latents": 5, "d_latents": 16}
        >>> config |= {"num_self_attends_per_block": 1, "num_cross_attention_heads": 1, "train_size": [6, 8]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = pc.interop.save_transformers(build(config), folder, config=config)
        ...     model = pc.interop.load_transformers(saved)
        >>> model(torch.rand(1, 2, 3, 6, 8)).shape
        torch.Size([1, 2, 6, 8])
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    folder, entries = Path(folder), configs.as_dictionary(config)
    _check_described(model, entries, numerics)
    state = state_tensors(model)
    check_values(state)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise ValueError(
            f"model must have weights of one floating point dtype; got {sorted(map(str, dtypes))}. "
            "Convert it: model.float()"
        )
    theirs = from_transformers(entries, transposed_stem=numerics.transposed_stem).save(state)
    theirs = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in theirs.items()}
    written = _expressed(entries, numerics) | {"dtype": str(dtypes.pop()).removeprefix("torch.")}
    metadata = {"format": "pt", DIGEST: _digest(configs.complete(written), theirs)}
    try:
        text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must hold what JSON can express: {error}") from error
    make_folder(folder)
    write_atomically(
        {
            folder / WEIGHTS: lambda path: save_file(theirs, path, metadata),
            folder / CONFIG: text,
        }
    )
    return folder


def _digest(config: Config, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of the weights, and of the entries of a complete configuration that outputs depend on.

    `save_transformers` writes it into the metadata of the weights. It shows whether both files are of one save and
    undamaged. Files of transformers do not have it.
    """
    entries = {name: config[name] for name in ("architectures", *configs.DEFAULTS) if name != TRAINING_ONLY}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_described(model: nn.Module, config: Config, numerics: Numerics) -> None:
    """Check that `config` and `numerics` describe this model, and that transformers can compute the same outputs."""
    with torch.device("meta"):
        described, theirs = build(config, numerics), build(_expressed(config, numerics))
    expected, actual = registry.to_config(described), registry.to_config(model)
    different = _difference(expected, actual) or model_differences(described, model)
    different = different or spec_differences(
        tensor_specs(state_tensors(described)), tensor_specs(state_tensors(model))
    )
    if different:
        raise ValueError(
            f"model must be the {configs.architecture_of(config)} that config and numerics describe: {different}. Give "
            "those that it was loaded with"
        )
    different = _difference(registry.to_config(theirs), actual)
    if not different and numerics.transposed_stem and configs.architecture_of(config) == configs.CONVOLUTIONAL:
        different = "the kernel of its stem is transposed"
    if different:
        raise ValueError(
            f"transformers cannot express what this model computes: {different}. Load the original with "
            "numerics=interop.TRANSFORMERS_NUMERICS to write what transformers computes"
        )


def _expressed(config: Config, numerics: Numerics) -> dict[str, registry.Json]:
    """Return the configuration to write. A `hidden_act` of "gelu" is replaced by the name of `numerics.activation`."""
    written = {"model_type": "perceiver", **configs.transformers_entries(config)}
    written.pop("torch_dtype", None)  # older name of the dtype entry
    if configs.complete(config)["hidden_act"] == "gelu":
        chosen = registry.to_config(numerics.activation)
        known = {"gelu": TRANSFORMERS_NUMERICS.activation, **configs.ACTIVATIONS}
        names = [name for name, activation in known.items() if registry.to_config(activation) == chosen]
        written["hidden_act"] = (names or ["gelu"])[0]
    return written


def _difference(expected: registry.Json, actual: registry.Json, path: str = "") -> str:
    """Describe the first difference between two configs from `registry.to_config`. Return "" if they are equal."""
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        inside = (_difference(expected[key], actual[key], f"{path}.{key}".lstrip(".")) for key in expected)
        return next(filter(None, inside), "")
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        return _difference(dict(enumerate(expected)), dict(enumerate(actual)), path)
    return "" if expected == actual else f"{path or 'it'} is {_short(actual)}, not {_short(expected)}"


def _short(description: registry.Json) -> str:
    if isinstance(description, dict) and len(description) > 1:
        first = next((description[tag] for tag in ("part", "partial") if tag in description), None)
        return f"{first or 'a dictionary'} of {sorted(description.keys() - {'part', 'partial'})}"
    return f"{description!r:.80}"
