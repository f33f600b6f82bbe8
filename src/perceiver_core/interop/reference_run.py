"""Comparison of the outputs of this library's models with the original models in transformers and perceiver-pytorch.

Both models run on the same random inputs in float64, so that rounding errors are negligible. Output differences are
measured in standard deviations of the original output, because the output scale depends on the architecture: optical
flow is multiplied by 0.01, logits are not. In the code, `theirs` is the original model and `ours` is this library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from perceiver_core.adapters import FramePair
from perceiver_core.interop import transformers_config as configs
from perceiver_core.interop.transformers_config import Config
from perceiver_core.interop.weight_files.state_dict_files import read_state_dict
from perceiver_core.registry import Json

Outputs: TypeAlias = Tensor | Mapping[str, Tensor]
Inputs: TypeAlias = dict[str, Json]


def library(name: str) -> ModuleType:
    """Import and return the module with the Perceiver models of "transformers" or "perceiver-pytorch"."""
    try:
        if name == "transformers":
            from transformers.models.perceiver import modeling_perceiver as module
        else:
            import perceiver_pytorch as module
    except ImportError as error:
        raise ImportError(f"--check runs the original model; pip install {name}") from error
    return module


@torch.no_grad()
def transformers(folder: Path, ours: nn.Module) -> float:
    """Return the largest output difference between a transformers model and `ours`, in standard deviations.

    Args:
        folder: Folder with the transformers model.
        ours: This library's model, in evaluation mode. It is converted to float64 in place.
    """
    modeling = library("transformers")
    config = configs.complete(configs.read_config(folder))
    (architecture,) = config["architectures"]
    with _in_float64(modeling):
        theirs = getattr(modeling, architecture).from_pretrained(folder).double().eval()
        their_inputs, inputs = _inputs(architecture, config)
        expected = theirs(**their_inputs).logits
        if architecture == configs.FLOW:
            expected = expected.movedim(-1, 1)
        del theirs  # to save memory: each of the two optical flow models needs gigabytes
        return largest_difference(expected, ours.double()(**inputs))


@torch.no_grad()
def perceiver_pytorch(path: Path, arguments: Config, ours: nn.Module) -> float:
    """Return the largest output difference between a perceiver-pytorch model and `ours`, in standard deviations.

    Args:
        path: Safetensors file with the weights of the perceiver-pytorch model.
        arguments: All constructor arguments that the perceiver-pytorch model requires. None is inferred from the
            weights.
        ours: This library's model, in evaluation mode. It is converted to float64 in place.
    """
    module, weights = library("perceiver-pytorch"), read_state_dict(path)
    has_queries = any(name.startswith("decoder_cross_attn.") for name in weights)
    try:
        theirs = (module.PerceiverIO if has_queries else module.Perceiver)(**arguments)
        theirs.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"arguments must be all that their constructor needs, for --check: {error}") from error
    theirs, ours = theirs.double().eval(), ours.double()
    with _in_float64():
        if has_queries:
            tokens, queries = _drawn(2, 11, arguments["dim"]), _drawn(5, len(weights["decoder_cross_attn.norm.weight"]))
            return largest_difference(theirs(tokens, queries=queries), ours(tokens, query_inputs=queries))
        sizes = (13, 7, 5, 3)[: arguments.get("input_axis", 2)]
        data = _drawn(2, *sizes, arguments.get("input_channels", 3))
        return largest_difference(theirs(data), ours(data))


def largest_difference(expected: Outputs, actual: Outputs) -> float:
    """Return the largest absolute output difference, in standard deviations of the expected tensor.

    Dictionaries are compared tensor by tensor. If any difference is NaN, the result is NaN.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        return float(torch.tensor([largest_difference(expected[name], actual[name]) for name in expected]).max())
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor) or expected.shape != actual.shape:
        raise ValueError(f"the original gives {_layout(expected)}, ours {_layout(actual)}")
    deviation = float(expected.std(correction=0)) or float(expected.abs().max()) or 1.0  # a constant output has std 0
    return float((expected - actual).abs().max()) / deviation


def _layout(outputs: Outputs) -> object:
    return tuple(outputs.shape) if isinstance(outputs, Tensor) else sorted(outputs)


@contextmanager
def _in_float64(modeling: ModuleType | None = None) -> Iterator[None]:
    """Context manager that sets the default dtype to float64.

    In the module `modeling` of transformers, it also replaces the function that computes float32 grid coordinates.
    """
    default, positions = torch.get_default_dtype(), getattr(modeling, "build_linear_positions", None)
    torch.set_default_dtype(torch.float64)
    try:
        if modeling is not None:
            vars(modeling)["build_linear_positions"] = _linear_positions
        yield
    finally:
        torch.set_default_dtype(default)
        if modeling is not None:
            vars(modeling)["build_linear_positions"] = positions


def _linear_positions(
    index_dims: Sequence[int], output_range: tuple[float, float] = (-1.0, 1.0), device: torch.device | None = None
) -> Tensor:
    """Compute grid coordinates like transformers' `build_linear_positions`, but in the default dtype, not float32."""
    first, last = output_range
    axes = [torch.linspace(first, last, size, device=device) for size in index_dims]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _inputs(architecture: str, config: Config) -> tuple[Inputs, Inputs]:
    """Return the same random batch as keyword arguments for the transformers model and for this library's model."""
    if architecture in (configs.TEXT, configs.SEQUENCE):
        length = config["max_position_embeddings"]
        ids = torch.randint(config["vocab_size"], (3, length), generator=torch.Generator().manual_seed(0))
        index, quarter = torch.arange(length), -(-length // 4)
        padding = [index >= length - quarter, index < quarter, (index >= quarter) & (index < 2 * quarter)]
        mask = ~torch.stack(padding)  # one sample each, padded on the right, on the left and inside
        return {"inputs": ids, "attention_mask": mask.long()}, {"inputs": ids, "mask": mask}
    if architecture == configs.FLOW:
        frames = _drawn(1, 2, 3, *config["train_size"])
        patches = FramePair(positions=None).patches(frames)
        return {"inputs": rearrange(patches, "b h w (t p) -> b t p h w", t=2)}, {"inputs": frames}
    if architecture == configs.MULTIMODAL:
        return _multimodal_inputs(config)
    side = config["image_size"] if architecture == configs.LEARNED else 224
    image = {"inputs": _drawn(1, 3, side, side)}
    return image, image


def _multimodal_inputs(config: Config) -> tuple[Inputs, Inputs]:
    """Return the same random batch as keyword arguments for both multimodal models (transformers, this library).

    To limit the cost, the arguments request only some of the output pixels and audio patches.
    """
    frames, *sides = config["output_shape"][1:]
    video = _drawn(1, frames, 3, *sides)
    audio = _drawn(1, config["num_frames"] * config["audio_samples_per_frame"])
    pixels, patches = video[:, :, 0].numel(), audio.shape[1] // config["samples_per_patch"]
    points = {"image": torch.arange(0, pixels, 97), "audio": torch.arange(0, patches, 3)}
    inputs = {"image": video, "audio": audio, "label": torch.zeros(1, config["num_labels"])}
    theirs = {"inputs": inputs | {"audio": audio[..., None]}, "subsampled_output_points": {**points, "label": None}}
    return theirs, {"inputs": inputs, "query_inputs": points}


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
