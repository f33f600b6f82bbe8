"""Logits and attention maps of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from examples.akoa import model as _model  # noqa: F401 (registers the stem for loading)
from examples.akoa.dataset.datamodule import to_model_input
from perceiver_core import Perceiver
from perceiver_core.adapters import Image


def predict(
    model: nn.Module, images: UInt8[Tensor, "n h w"], batch: int = 256, *, progress: bool = False
) -> Float64[np.ndarray, " n"]:
    """Logit of each image, positive for right.

    The model runs in evaluation mode; afterwards all its modules have their previous modes.

    Args:
        model: Module from images `b 1 h w` to one logit each, `b` or `b 1`.
        images: Gray levels.
        batch: Number of images of a batch, which does not affect the result.
        progress: Show a progress bar.

    Raises:
        ValueError: The output has another shape, or a logit is not finite.
    """
    if not len(images):
        return np.empty(0)
    return _batched(model, images, batch, progress, lambda inputs: _one_logit(model(inputs)))


def attention_maps(
    model: nn.Module, images: UInt8[Tensor, "n h w"], batch: int = 16
) -> Float64[np.ndarray, "n rows columns"]:
    """Attention of the last read to each token, averaged over latents and heads.

    Each map sums to 1. It has the grid of the tokens, which are pixels or patches.

    Args:
        model: A `Perceiver`, or a module that contains one; the first is used.
        images: Gray levels of at least one image.
        batch: Number of images of a batch. A map takes latents x tokens x 4 bytes for each head and image.

    Raises:
        ValueError: The model contains no Perceiver.
    """
    perceiver = find_perceiver(model)
    return _batched(model, images, batch, False, lambda inputs: _read_map(perceiver, inputs))


def find_perceiver(model: nn.Module) -> Perceiver:
    """Return the model itself, or the first Perceiver that it contains.

    Raises:
        ValueError: It contains none.
    """
    perceiver = next((part for part in model.modules() if isinstance(part, Perceiver)), None)
    if perceiver is None:
        raise ValueError(f"model: a {type(model).__name__} contains no Perceiver")
    return perceiver


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width that a `knee_model` was trained at, in pixels, derived from the model alone.

    The maximal resolution of its positions is the grid of tokens, and its stem sets the number of pixels per token. The
    result is exact if tokens divide the image, and else rounded up to the next token.

    Raises:
        ValueError: The model has other parts, from which the size cannot be derived.
    """
    adapter = find_perceiver(model).adapter
    grid: tuple[float, ...] = getattr(getattr(adapter, "positions", None), "max_resolution", ())
    if not isinstance(adapter, Image) or len(grid) != 2:
        raise ValueError("model: its parts do not determine the size of its images; give --size")
    side = 64
    probe = next(model.parameters()).new_zeros(1, adapter.num_channels, side, side)
    with evaluation_mode(model):
        pixels = [side // tokens for tokens in adapter.stem(probe).shape[-2:]]
    return round(grid[0] * pixels[0]), round(grid[1] * pixels[1])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context of evaluation mode without gradients; all modules have their previous modes afterwards."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _batched(
    model: nn.Module,
    images: UInt8[Tensor, "n h w"],
    batch: int,
    progress: bool,
    function: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """Apply a function to the images in batches, with the model in evaluation mode."""
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    batches = tqdm(torch.split(images, batch), desc="images", unit="batch", disable=None if progress else True)
    with evaluation_mode(model):
        outputs = [function(to_model_input(piece).to(device)).double().cpu() for piece in batches]
    return torch.cat(outputs).numpy()


def _one_logit(output: Tensor) -> Float[Tensor, " b"]:
    """Check that an output is one finite logit for each image, and flatten it."""
    if output.ndim > 2 or output.shape[1:] not in ((), (1,)):
        raise ValueError(f"model: returned shape {tuple(output.shape)} for a batch of images, need one logit each")
    logits = output.reshape(len(output))
    if not logits.isfinite().all():
        raise ValueError("model: returned a logit that is not finite; its weights are damaged")
    return logits


def _read_map(model: Perceiver, inputs: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b r c"]:
    """Attention of the last read, averaged over latents and heads, on the grid of the tokens."""
    tokens = model.adapter(inputs)
    weights: Tensor = model.encoder.attention_map(tokens)  # type: ignore[operator]
    return weights.mean((1, 2)).reshape(len(inputs), *tokens.grid)
