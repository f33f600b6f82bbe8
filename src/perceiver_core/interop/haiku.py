"""Loader of Perceiver IO models that were trained with DeepMind's code, which uses Haiku (a JAX library).

Most of the configuration is inferred from the array shapes. Values that shapes do not determine, such as the number of
heads, default to the values of the published models. Shapes and dtypes are checked before any array is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch

from perceiver_core.error_messages import errors_with_path, printable_errors
from perceiver_core.interop import transformers_config as configs
from perceiver_core.interop.checked_arguments import CheckedArguments
from perceiver_core.interop.published_models import DEEPMIND_NUMERICS, Numerics, build
from perceiver_core.interop.published_weights import HAIKU_DECODERS, POSITIONS, from_haiku, haiku_encoder, load_weights
from perceiver_core.interop.transformers_config import Config
from perceiver_core.interop.weight_files import safe_pickle
from perceiver_core.interop.weight_files.array_header import ArrayHeader
from perceiver_core.interop.weight_files.npz import open_npz
from perceiver_core.interop.weight_files.weight_checks import check_floats
from perceiver_core.interop.weight_files.zip_archive import is_zip
from perceiver_core.models import PerceiverIO
from perceiver_core.registry import Json

LARGEST_FILE = 8 * 2**30  # bytes; the largest published file, the language model, has 0.8e9
MARKS = {  # parameters that identify an architecture; PIXELS has none of them
    "embed/embeddings": configs.TEXT,
    "image_preprocessor/~/conv2_d/w": configs.LEARNED,
    "image_preprocessor/~/conv2_d_downsample/~/conv/w": configs.CONVOLUTIONAL,
    "image_preprocessor/patches_linear/w": configs.FLOW,
    "multimodal_preprocessor/label_mask_token/pos_embs": configs.MULTIMODAL,
}
# Published values that shapes do not determine: (self-attention heads, encoder cross-attention heads, num_blocks).
HEADS = {configs.TEXT: (8, 8, 1), configs.FLOW: (16, 1, 1), configs.MULTIMODAL: (8, 1, 1)}
IMAGE_HEADS = (8, 1, 8)
CONTENT_CHANNELS = {configs.PIXELS: 3, configs.CONVOLUTIONAL: 64}  # channels of a token without Fourier features
# Entries of transformers' configuration that do not describe the model.
DESCRIPTIVE = {"architectures", "model_type", "id2label", "label2id", "layer_norm_eps", "initializer_range"}
DESCRIPTIVE |= {"transformers_version", "torch_dtype", "dtype", "_name_or_path"}
TRAINING_STATE = re.compile(r"/~/(mean|var)_ema/(hidden|counter)$")  # internals of running statistics


@printable_errors()
def load_haiku(path: str | PathLike[str], *, numerics: Numerics = DEEPMIND_NUMERICS, **config: Json) -> PerceiverIO:
    """Load a Perceiver IO model from Haiku parameters saved by DeepMind's code.

    Args:
        path: File with Haiku parameters: a pickle, such as the published files, or an `.npz` file with arrays named
            `scope/parameter`. A pickle may contain only dictionaries and arrays. No code in it is executed. The format
            is detected from the content, not from the file name.
        numerics: `interop.DEEPMIND_NUMERICS` to reproduce the outputs of DeepMind's code, or
            `interop.TRANSFORMERS_NUMERICS` to reproduce the outputs of transformers.
        config: Options of transformers' `PerceiverConfig` that array shapes do not determine, such as
            `num_self_attention_heads`, `num_blocks` and `train_size`. They default to the values of the published
            models. Image classifiers with Fourier features also accept `max_resolution`, the token grid size (height,
            width) in training. Its Nyquist frequencies are the highest Fourier frequencies. It defaults to [224, 224],
            or [56, 56] with a convolutional stem.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If `config` contains an unknown option.
        ValueError: If the file does not contain Haiku parameters of a published architecture.
        ValueError: If the parameters do not match `config`.
        ValueError: If the parameters do not have the same floating-point dtype, or are not finite.

    Example:
        >>> model = pc.interop.load_haiku("imagenet_fourier_position_encoding.pystate")  # doctest: +SKIP
        >>> small = pc.interop.load_haiku("trained_at_96_x_128.npz", max_resolution=[96, 128])  # doctest: +SKIP
    """
    return load_with_config(Path(path), numerics, config)[0]


def load_with_config(path: Path, numerics: Numerics, given: Config) -> tuple[PerceiverIO, dict[str, Json]]:
    """Load a model from a file of Haiku parameters. Return the model and its transformers configuration.

    The options in `given` replace options that are inferred from the file.
    """
    if unknown := sorted(given.keys() - configs.DEFAULTS.keys() - configs.FOURIER.keys() - DESCRIPTIVE):
        raise TypeError(
            f"a configuration of Perceiver IO has no {unknown}; it has {sorted(configs.DEFAULTS | configs.FOURIER)}"
        )
    with _open_parameters(path) as parameters, errors_with_path(path):
        arrays = {name: array for name, array in parameters.items() if not TRAINING_STATE.search(name)}
        headers = {name: array.as_tensor() for name, array in arrays.items()}
        check_floats(headers)
        config = _inferred_config(CheckedArguments(headers, given)) | dict(given)
        mapping = from_haiku(config, headers)
        mapping.check(headers)  # before building a model whose size the file determines
        with torch.device("meta"):
            model = build(config, numerics)
        load_weights(
            model, mapping, headers, lambda: {name: torch.from_numpy(array.read()) for name, array in arrays.items()}
        )
    return model, config


@contextmanager
def _open_parameters(path: Path) -> Iterator[dict[str, ArrayHeader]]:
    """Context manager that opens a Haiku file and yields a dictionary from `scope/parameter` to array headers."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of Haiku's parameters; there is none at {path}")
    if not 0 < (size := path.stat().st_size) <= LARGEST_FILE:
        raise ValueError(f"{path} must hold a published Perceiver IO, at most {LARGEST_FILE} bytes; it has {size}")
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        raise ValueError(f"{path} holds a single array; give an .npz of all, named scope/parameter")
    if is_zip(path):  # a zip file, as safe_pickle would reject a pickle that starts with P
        with open_npz(path) as arrays:
            yield arrays
    else:
        yield safe_pickle.read(path)


def _inferred_config(checked: CheckedArguments) -> dict[str, Json]:
    """Infer the transformers configuration from array shapes.

    Options that shapes do not determine, such as the number of heads, get the values of the published models.
    """
    names, length = checked.weights, checked.length
    architecture = next((architecture for mark, architecture in MARKS.items() if mark in names), configs.PIXELS)
    heads, cross_heads, blocks = HEADS.get(architecture, IMAGE_HEADS)
    encoder = haiku_encoder(names)
    latents, read = f"{encoder}/{POSITIONS}", f"{encoder}/cross_attention"
    if latents not in names:
        raise ValueError(f"it must hold a published Perceiver IO; it lacks {latents}, and has {sorted(names)[:5]}")
    dim = length(latents, 1)
    query = re.compile(rf"{re.escape(encoder)}/self_attention(_\d+)?/attention/linear/w")
    config = {
        "architectures": [architecture],
        "num_latents": length(latents),
        "d_latents": dim,
        "num_blocks": blocks,
        "num_self_attends_per_block": sum(query.fullmatch(name) is not None for name in names),
        "num_self_attention_heads": heads,
        "num_cross_attention_heads": cross_heads,
        "attention_probs_dropout_prob": 0.0,
        "self_attention_widening_factor": length(f"{encoder}/self_attention/mlp/linear/w", 1) // dim,
        "cross_attention_widening_factor": length(f"{read}/mlp/linear/w", 1) // dim,
    }
    return config | _inferred_ends(architecture, checked, f"{encoder}/self_attention/attention", f"{read}/layer_norm_1")


def _inferred_ends(architecture: str, checked: CheckedArguments, attention: str, input_norm: str) -> dict[str, Json]:
    """Infer the options for the inputs and outputs of the architecture, such as `vocab_size` and `num_labels`.

    `attention` and `input_norm` are Haiku scopes in the encoder: a self-attention layer, and the norm of the inputs.
    """
    length, fourier = checked.length, sorted(checked.arguments.keys() & configs.FOURIER.keys())
    if fourier and architecture not in CONTENT_CHANNELS:
        raise ValueError(f"{fourier} must be left out: the file holds a {architecture}, for which they are fixed")
    if architecture == configs.TEXT:
        return {
            "vocab_size": length("embed/embeddings"),
            "d_model": length("embed/embeddings", 1),
            "max_position_embeddings": length(POSITIONS),
            "qk_channels": length(f"{attention}/linear/w", 1),
            "v_channels": length(f"{attention}/linear_2/w", 1),
        }
    outputs = length(f"{HAIKU_DECODERS[architecture]}/output/w", 1)
    if architecture == configs.MULTIMODAL:
        labels, patch = (length(f"{name}_postprocessor/linear/w", 1) for name in ("classification", "audio"))
        return {"num_labels": labels, "samples_per_patch": patch, "output_num_channels": outputs}
    if architecture == configs.LEARNED:
        points = length(f"image_preprocessor/~_build_network_inputs/{POSITIONS}")
        return {"num_labels": outputs, "image_size": round(points**0.5)}
    if architecture in CONTENT_CHANNELS:
        return {"num_labels": outputs, "num_bands": _num_bands(checked, architecture, f"{input_norm}/scale")}
    return {}


def _num_bands(checked: CheckedArguments, architecture: str, key: str) -> int:
    """Infer the number of Fourier bands from the token width, which is the length of the parameter named `key`."""
    width, content = checked.length(key), CONTENT_CHANNELS[architecture]
    bands, rest = divmod(width - content - 2, 4)  # for each of two axes: the coordinate, num_bands sines and cosines
    if rest or bands < 1:
        raise ValueError(f"{key} must have {content} + 2 x (2 x num_bands + 1) values; got {width}")
    return checked.agreed("num_bands", bands, key)
