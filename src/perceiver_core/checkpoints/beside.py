"""Original models run beside ours on random inputs, where the library that they are of is installed.

Both run in float64, where what is left of a difference is no rounding, and differences are told in standard deviations
of the original's output: flow is a hundredth of what a decoder gives, logits are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from perceiver_core.adapters import FramePair
from perceiver_core.checkpoints.of_transformers import read_config
from perceiver_core.checkpoints.renamed import weights_of

PACKAGES = {"transformers": "transformers", "perceiver-pytorch": "perceiver_pytorch"}


def library(name: str) -> Any:
    """The module that has an original's classes.

    Args:
        name: one of `PACKAGES`, as it is installed.

    Raises:
        ImportError: it is not installed.

    Example:
        >>> from perceiver_core.checkpoints import beside
        >>> beside.library("transformers").PerceiverForMaskedLM  # doctest: +SKIP
        <class 'transformers.models.perceiver.modeling_perceiver.PerceiverForMaskedLM'>
    """
    try:
        if name == "transformers":
            from transformers.models.perceiver import modeling_perceiver as found
        else:
            import perceiver_pytorch as found
    except ImportError as error:
        raise ImportError(f"--check runs the original model; pip install {name}") from error
    return found


@torch.no_grad()
def transformers(folder: Path, ours: nn.Module) -> float:
    """The largest difference between what transformers computes from a folder and what a model of ours computes.

    Args:
        folder: with `config.json` and weights.
        ours: in evaluation mode; it is converted to float64.

    Returns:
        The difference in standard deviations of what transformers computes.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> from pathlib import Path
        >>> import perceiver_core as pc
        >>> from perceiver_core.checkpoints import beside
        >>> folder = Path("vision-perceiver-fourier")
        >>> beside.transformers(folder, pc.checkpoints.hugging_face(folder))  # doctest: +SKIP
        3.1e-13
    """
    modeling = library("transformers")
    kind = read_config(folder)["architectures"][0]
    with _in_double(modeling):
        theirs = getattr(modeling, kind).from_pretrained(folder).double().eval()
        given, own = _inputs(kind, theirs.config)
        wanted = theirs(**given).logits
        if kind == "PerceiverForOpticalFlow":
            wanted = wanted.movedim(-1, 1)
        del theirs  # for flow, each needs gigabytes
        return _difference(wanted, ours.double()(**own))


@torch.no_grad()
def perceiver_pytorch(path: Path, arguments: Mapping[str, Any], ours: nn.Module) -> float:
    """The largest difference between a model of perceiver-pytorch and ours.

    Args:
        path: a safetensors file of its weights.
        arguments: of their constructor, all that it needs.
        ours: in evaluation mode; it is converted to float64.

    Returns:
        The difference in standard deviations of what theirs computes.

    Raises:
        ImportError: perceiver-pytorch is not installed.
        ValueError: arguments that make no model, or one that the weights are not of.

    Example:
        >>> from pathlib import Path
        >>> import perceiver_core as pc
        >>> from perceiver_core.checkpoints import beside
        >>> told = {"depth": 6, "max_freq": 10.0, "num_freq_bands": 6}
        >>> ours = pc.checkpoints.lucidrains("theirs.safetensors", **told)  # doctest: +SKIP
        >>> beside.perceiver_pytorch(Path("theirs.safetensors"), told, ours)  # doctest: +SKIP
        5.2e-15
    """
    found = library("perceiver-pytorch")
    weights = weights_of(path)
    answers = any(name.startswith("decoder_cross_attn.") for name in weights)
    try:
        theirs = (found.PerceiverIO if answers else found.Perceiver)(**arguments)
        theirs.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"arguments must be all that made their model, which --check makes again: {error}") from error
    theirs, ours = theirs.double().eval(), ours.double()
    with _in_double():
        if answers:
            tokens, queries = _drawn(2, 11, arguments["dim"]), _drawn(5, len(weights["decoder_cross_attn.norm.weight"]))
            return _difference(theirs(tokens, queries=queries), ours(tokens, query_inputs=queries))
        sizes = (13, 7, 5, 3)[: arguments.get("input_axis", 2)]
        data = _drawn(2, *sizes, arguments.get("input_channels", 3))
        return _difference(theirs(data), ours(data))


@contextmanager
def _in_double(modeling: Any = None) -> Iterator[None]:
    """New tensors are float64, and so are the positions that transformers makes in float32 whatever its model is."""
    default, positions = torch.get_default_dtype(), getattr(modeling, "build_linear_positions", None)
    torch.set_default_dtype(torch.float64)
    try:
        if modeling is not None:
            modeling.build_linear_positions = _positions
        yield
    finally:
        torch.set_default_dtype(default)
        if modeling is not None:
            modeling.build_linear_positions = positions


def _positions(index_dims: Any, output_range: Any = (-1.0, 1.0), device: Any = None) -> Tensor:
    """As transformers has them: the points of a grid."""
    first, last = output_range
    axes = [torch.linspace(first, last, size, device=device) for size in index_dims]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _inputs(kind: str, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sample, as transformers takes it and as ours do."""
    if kind in ("PerceiverForMaskedLM", "PerceiverForSequenceClassification"):
        length = config.max_position_embeddings
        ids = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
        places, quarter = torch.arange(length), -(-length // 4)
        hidden = [places >= length - quarter, places < quarter, (places >= quarter) & (places < 2 * quarter)]
        mask = ~torch.stack(hidden)  # padding on the right, on the left, a gap
        return {"inputs": ids, "attention_mask": mask.long()}, {"inputs": ids, "mask": mask}
    if kind == "PerceiverForOpticalFlow":
        frames = _drawn(1, 2, 3, *config.train_size)
        patches = FramePair(positions=None).patches(frames)
        return {"inputs": rearrange(patches, "b h w (t p) -> b t p h w", t=2)}, {"inputs": frames}
    if kind == "PerceiverForMultimodalAutoencoding":
        return _of_modalities(config)
    side = config.image_size if kind.endswith("Learned") else 224
    picture = _drawn(1, 3, side, side)
    return {"inputs": picture}, {"inputs": picture}


def _of_modalities(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Film and sound, and some of the points that are asked about."""
    frames, *sides = config.output_shape[1:]
    film = _drawn(1, frames, 3, *sides)
    sound, label = _drawn(1, config.num_frames * config.audio_samples_per_frame), torch.zeros(1, config.num_labels)
    pixels, patches = film[:, :, 0].numel(), sound.shape[1] // config.samples_per_patch
    at = {"image": torch.arange(0, pixels, 97), "audio": torch.arange(0, patches, 3)}
    inputs = {"image": film, "audio": sound, "label": label}
    theirs = {"inputs": inputs | {"audio": sound[..., None]}, "subsampled_output_points": {**at, "label": None}}
    return theirs, {"inputs": inputs, "at": at}


def _difference(wanted: Any, found: Any) -> float:
    """The largest between tensors, or between those of two dictionaries, in standard deviations; NaN where one is."""
    if isinstance(wanted, dict):
        return float(torch.tensor([_difference(wanted[name], found[name]) for name in wanted]).max())
    if wanted.shape != found.shape:
        raise ValueError(f"the original gives {tuple(wanted.shape)}, ours {tuple(found.shape)}")
    scale = float(wanted.std(correction=0)) or float(wanted.abs().max()) or 1.0  # one value alone does not deviate
    return float((wanted - found).abs().max()) / scale


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
