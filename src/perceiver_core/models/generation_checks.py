"""Checks of the arguments of `generate` and of the ids that its sampler returns."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core import checks
from perceiver_core.models.perceiver_ar import PerceiverAR
from perceiver_core.models.sampling import Sampler

REQUIRED = ("vocab_size", "num_latents", "embedding", "latent_transformer", "training")


def check_parts(model: PerceiverAR, sampler: Sampler, generator: torch.Generator | None) -> None:
    """Raise unless the model is a Perceiver AR in evaluation mode, and sampler and generator have the right types."""
    if missing := [name for name in REQUIRED if not hasattr(model, name)]:
        raise TypeError(
            f"model must be a PerceiverAR, or have its attributes; got {_name(model)} without {', '.join(missing)}"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout; call model.eval()")
    if isinstance(sampler, type) or not callable(sampler):
        hint = f". Build it: {sampler.__name__}()" if isinstance(sampler, type) else ""
        raise TypeError(
            "sampler must be a function of logits and a generator, such as sampling.greedy or sampling.Sample(); "
            f"got {_name(sampler)}{hint}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {generator!r}. Build one: torch.Generator()")


def checked_stop_ids(stop_ids: int | Collection[int], vocab_size: int) -> tuple[int, ...]:
    """Return the stop ids as a tuple, after checks."""
    if isinstance(stop_ids, str) or not isinstance(stop_ids, (int, Iterable)):
        raise TypeError(f"stop_ids must be an id or a collection of ids; got {stop_ids!r}")
    ids = (stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids)
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            raise ValueError(f"stop_ids must be ids of the vocabulary, 0 ... {vocab_size - 1}; got {number!r}")
    return ids


def checked_context_length(model: PerceiverAR, context_length: int | None) -> int | None:
    """Return the context length: by default the number of positions of the model's embedding, None for unlimited."""
    longest: int | None = getattr(model.embedding, "length", None)
    if context_length is None:
        return longest
    checks.positive(context_length=context_length)
    if longest is not None and context_length > longest:
        raise ValueError(
            f"context_length must be at most {longest}, the number of positions of the embedding; got {context_length}"
        )
    return context_length


def check_sampled(ids: Tensor, logits: Float[Tensor, "b v"]) -> None:
    """Raise unless a sampler returned one id of the vocabulary per sample."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"sampler must return a torch.Tensor of ids; got {_name(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"sampler must return integer ids; got {ids.dtype}")
    if ids.shape != logits.shape[:1]:
        raise ValueError(f"sampler must return one id per sample, shape ({len(logits)},); got {tuple(ids.shape)}")
    checks.below("ids from the sampler", ids, logits.shape[1])


def _name(x: object) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else repr(x) if isinstance(x, str) else type(x).__name__
