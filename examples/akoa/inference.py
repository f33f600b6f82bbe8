"""What a trained model says about pictures, and where it looks: logits and attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from examples.akoa import model as _model  # noqa: F401 (registers the stem that weights name)
from examples.akoa.data import as_input
from perceiver_core import Perceiver
from perceiver_core.adapters import Image


def predict(
    model: nn.Module, pictures: UInt8[Tensor, "n h w"], batch: int = 256, *, progress: bool = False
) -> Float64[np.ndarray, " n"]:
    """The logit of each picture, positive = right.

    The model is in evaluation mode meanwhile, and in the mode it came in afterwards.

    Args:
        model: takes pictures `b 1 h w` and gives one logit each, `b` or `b 1`.
        pictures: gray levels.
        batch: how many pictures at a time; has no effect on the result.
        progress: show a bar.

    Raises:
        ValueError: the model gives another shape, or a logit that is not finite.
    """
    if not len(pictures):
        return np.empty(0)
    return _batched(model, pictures, batch, progress, lambda inputs: _one_logit(model(inputs)))


def attention(
    model: nn.Module, pictures: UInt8[Tensor, "n h w"], batch: int = 16
) -> Float64[np.ndarray, "n rows columns"]:
    """How much the last read attends to each token: the mean over latents and heads.

    Each map adds to 1. It has the grid of the tokens: the pixels, or the patches.

    Args:
        model: a `Perceiver`, or a module that holds one; the first found is looked into.
        pictures: gray levels, at least one.
        batch: how many at a time. A map takes latents x tokens x 4 bytes for each head and picture.

    Raises:
        ValueError: there is no Perceiver in the model.
    """
    inside = perceiver_in(model)
    return _batched(model, pictures, batch, False, lambda inputs: _read_map(inside, inputs))


def perceiver_in(model: nn.Module) -> Perceiver:
    """The model itself, or the first Perceiver that it holds.

    Raises:
        ValueError: there is none.
    """
    inside = next((part for part in model.modules() if isinstance(part, Perceiver)), None)
    if inside is None:
        raise ValueError(f"model: a {type(model).__name__} holds no Perceiver")
    return inside


def picture_size(model: nn.Module) -> tuple[int, int]:
    """Height and width that a `knee_model` was trained at, in pixels, from the model alone.

    Its positions are scaled to the grid of tokens, and its stem makes a token of so many pixels. It is
    exact where tokens divide the picture, and else rounded up to the next token.

    Raises:
        ValueError: the model has other parts, which do not tell.
    """
    adapter = perceiver_in(model).adapter
    grid: tuple[float, ...] = getattr(getattr(adapter, "positions", None), "max_resolution", ())
    if not isinstance(adapter, Image) or len(grid) != 2:
        raise ValueError("model: its parts do not tell the size of its pictures; give --size")
    side = 64
    probe = next(model.parameters()).new_zeros(1, adapter.num_channels, side, side)
    with evaluating(model):
        pixels = [side // tokens for tokens in adapter.stem(probe).shape[-2:]]
    return round(grid[0] * pixels[0]), round(grid[1] * pixels[1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modes of all parts are put back afterwards."""
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
    pictures: UInt8[Tensor, "n h w"],
    batch: int,
    progress: bool,
    answer: Callable[[Tensor], Tensor],
) -> np.ndarray:
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    pieces = tqdm(torch.split(pictures, batch), desc="pictures", unit="batch", disable=None if progress else True)
    with evaluating(model):
        answers = [answer(as_input(piece).to(device)).double().cpu() for piece in pieces]
    joined: np.ndarray = torch.cat(answers).numpy()
    return joined


def _one_logit(answer: Tensor) -> Float[Tensor, " b"]:
    if answer.ndim > 2 or answer.shape[1:] not in ((), (1,)):
        raise ValueError(f"model: gave shape {tuple(answer.shape)} for a batch of pictures, need one logit each")
    logits = answer.reshape(len(answer))
    if not logits.isfinite().all():
        raise ValueError("model: gave a logit that is not finite; its weights are broken")
    return logits


def _read_map(model: Perceiver, inputs: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b r c"]:
    tokens = model.adapter(inputs)
    weights: Tensor = model.encoder.attention_map(tokens)  # type: ignore[operator]
    return weights.mean((1, 2)).reshape(len(inputs), *tokens.grid)
