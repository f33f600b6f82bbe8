"""Token-by-token generation with Perceiver AR and cached keys and values.

Each new token becomes a latent, and its keys and values are appended to the caches. When the number of latents has
reached the model's maximum, it restarts at `num_initial_latents`: latents are recomputed for that many last tokens, and
each new token again adds one. Cached keys and values of the cross-attention do not depend on latents and are kept.
Without caches, the numbers of latents are the same, and so are the logits.

Once the sequence is longer than `context_length`, each new token drops the oldest token. Because cached latents depend
on the dropped token, all keys, values and latents are then recomputed for each new token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import cycle
from typing import cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from perceiver_core import argument_types, checks, masks
from perceiver_core.argument_errors import explained
from perceiver_core.argument_types import shown
from perceiver_core.blocks import LatentTransformer
from perceiver_core.models.perceiver_ar import DecodingStep, PerceiverAR, causal
from perceiver_core.models.sampling import Sampler, greedy
from perceiver_core.reads import KeysValuesCache


@explained
def generate(  # noqa: PLR0913 (options of generation)
    model: PerceiverAR,
    prompt: Shaped[Tensor, "b n"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "b n"] | None = None,
    sampler: Sampler = greedy,
    stop_ids: int | Collection[int] = (),
    num_initial_latents: int | None = None,
    context_length: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b t"]:
    """Generate tokens after a prompt, one at a time.

    Args:
        model: Model in evaluation mode.
        prompt: Token ids `b n`, at least one per sample. Only the last `context_length` ids are used.
        max_new_tokens: Maximum number of tokens to generate.
        mask: Mask of the valid prompt tokens, True = attend. Pad shorter prompts on the left.
        sampler: Callable `(logits: b v, generator) -> ids: b`, such as `sampling.greedy` or `sampling.Sample()`.
        stop_ids: Token id, or collection of ids, that ends a sample. A finished sample repeats its last id until all
            samples are finished.
        num_initial_latents: Number of latents for the first new token. Each new token adds a latent. After
            `model.num_latents` is reached, the number restarts at `num_initial_latents`. At most `model.num_latents`
            (default: half of `model.num_latents`). In a shorter sequence, every token is a latent.
        context_length: Maximum number of tokens to attend to. In a longer sequence, each new token drops the oldest
            token, the first remaining token gets position 0, and caches give no speedup. Defaults to the number of
            positions in the model's embedding, or to no limit if the embedding has no positions.
        use_cache: True to cache keys and values, False to recompute them for each token. The result is the same.
        generator: Random generator for the sampler.

    Returns:
        Generated ids `b t`. `t` is less than `max_new_tokens` if all samples finish earlier.

    Raises:
        TypeError: If an argument has the wrong type, or the sampler returns ids that are not integers.
        ValueError: If the model is in training mode, or a number is out of range.
        ValueError: If the prompt is empty or has an unknown id, or the mask has a wrong shape or padding on the right.
        ValueError: If the sampler does not return one id per sample.

    Example:
        >>> embedding = pc.adapters.TokenEmbedding(vocab_size=256, dim=32)
        >>> model = pc.PerceiverAR(embedding, num_latents=8, depth=2, num_heads=4).eval()
        >>> prompt = torch.tensor([list(b"once upon a time")])
        >>> pc.generate(model, prompt, max_new_tokens=20, sampler=pc.models.sampling.Sample(top_p=0.9)).shape
        torch.Size([1, 20])

    Reference: google-research/perceiver-ar, sample_utils.py: `reset_memory` also recomputes half of the latents when
    the maximum number of latents has been reached.
    """
    tokens = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        mask=mask,
        sampler=sampler,
        stop_ids=stop_ids,
        num_initial_latents=num_initial_latents,
        context_length=context_length,
        use_cache=use_cache,
        generator=generator,
    )
    return torch.stack(list(tokens), dim=1)


@explained
def stream(  # noqa: PLR0913 (options of generation)
    model: PerceiverAR,
    prompt: Shaped[Tensor, "b n"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "b n"] | None = None,
    sampler: Sampler = greedy,
    stop_ids: int | Collection[int] = (),
    num_initial_latents: int | None = None,
    context_length: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """Generate tokens after a prompt, and yield the ids `b` of each step as soon as they are sampled.

    The arguments and errors are the same as for `generate`. The arguments are checked when `stream` is called, and the
    ids from the sampler are checked during iteration.

    Example:
        >>> embedding = pc.adapters.TokenEmbedding(vocab_size=256, dim=32)
        >>> model = pc.PerceiverAR(embedding, num_latents=8, depth=2, num_heads=4).eval()
        >>> for ids in pc.models.stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5):
        ...     assert ids.shape == (1,)
    """
    _check_parts(model, sampler, generator)
    argument_types.check({"use_cache": use_cache}, {"use_cache": bool})
    stops = _checked_stop_ids(stop_ids, model.vocab_size)
    initial = max(1, model.num_latents // 2) if num_initial_latents is None else num_initial_latents
    checks.ids("prompt", prompt, model.vocab_size)
    if mask is not None:
        checks.is_mask("mask", mask, prompt.shape)
        checks.padded_on_the_left("mask", mask)
    checks.positive(max_new_tokens=max_new_tokens)
    checks.positive(at_most=model.num_latents, num_initial_latents=initial)
    longest: int | None = getattr(model.embedding, "length", None)  # None if the number of positions is unlimited
    if context_length is None:
        context_length = longest
    else:
        checks.positive(context_length=context_length)
        if longest is not None and context_length > longest:
            raise ValueError(
                f"context_length must be at most {longest}, the number of positions of the embedding; "
                f"got {context_length}"
            )
    sequence = _Sequence(model, prompt.long(), mask, initial, context_length)
    logits = _cached(sequence) if use_cache else _recomputed(sequence)
    return _sampled(logits, sequence, max_new_tokens, sampler, generator, stops)


def latent_schedule(num_latents: int, num_initial_latents: int) -> Iterator[int]:
    """Return an endless iterator over the number of latents for each new token.

    The number counts up from `num_initial_latents` to `num_latents`, then restarts. It does not depend on the prompt.
    In a sequence shorter than this number, every token is a latent.

    Example:
        >>> from itertools import islice
        >>> from perceiver_core.models.generate import latent_schedule
        >>> list(islice(latent_schedule(num_latents=6, num_initial_latents=3), 7))
        [3, 4, 5, 6, 3, 4, 5]
    """
    return cycle(range(num_initial_latents, num_latents + 1))


class _Sequence:
    """Ids and mask of the prompt tokens and generated tokens, limited to the last `context_length` tokens."""

    def __init__(
        self, model: PerceiverAR, ids: Tensor, mask: Tensor | None, num_initial_latents: int, context_length: int | None
    ) -> None:
        last = slice(0 if context_length is None else -context_length, None)
        self.model, self.context_length = model, context_length
        self.ids, self.mask = ids[:, last], None if mask is None else mask[:, last]
        self.schedule = latent_schedule(model.num_latents, num_initial_latents)
        self.prompt_length = self.ids.shape[1]
        self.shifted = False  # True if the last `append` dropped a token

    def append(self, ids: Int[Tensor, " b"]) -> None:
        self.shifted = self.ids.shape[1] == self.context_length
        kept = slice(int(self.shifted), None)
        self.ids = torch.cat([self.ids[:, kept], ids[:, None]], 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask[:, kept], self.mask.new_ones(len(ids), 1)], 1)

    def last(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the last `count` ids, `b count`, and their mask."""
        return self.ids[:, -count:], None if self.mask is None else self.mask[:, -count:]

    def indices(self, count: int) -> tuple[Tensor, Tensor]:
        """Return two kinds of positions of the last `count` tokens: for position embeddings and for rotary embeddings.

        Returns:
            Indices for position embeddings, `count` or `b count`, computed as `TokenEmbedding` does.
            Positions for rotary embeddings, `count`: 0 for the last prompt token, negative for the tokens before it.
        """
        last = torch.arange(self.ids.shape[1], device=self.ids.device)[-count:]
        mask = None if getattr(self.model.embedding, "positions_include_padding", False) else self.mask
        indices = last if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]
        return indices, last - (self.prompt_length - 1)  # 0 at the last token of the prompt until a token is dropped

    def attention_mask(self, num_queries: int, num_keys: int) -> masks.Mask | None:
        """Return the mask for attention from the last `num_queries` tokens to the last `num_keys` tokens."""
        _, valid = self.last(num_keys)
        if num_queries > 1:
            return causal(valid)
        return None if valid is None else masks.Padding(valid)


@torch.no_grad()
def _sampled(
    logits: Iterator[Float[Tensor, "b v"]],
    sequence: _Sequence,
    max_new_tokens: int,
    sampler: Sampler,
    generator: torch.Generator | None,
    stop_ids: tuple[int, ...],
) -> Iterator[Tensor]:
    """Sample ids from the logits of each step, yield them, and append them to the sequence."""
    ids = sequence.ids[:, -1]
    finished, stops = torch.zeros_like(ids, dtype=torch.bool), ids.new_tensor(stop_ids)
    for number, next_logits in enumerate(logits, 1):
        sampled = sampler(next_logits, generator)
        if not isinstance(sampled, Tensor):
            raise TypeError(f"sampler must return a torch.Tensor of ids; got {shown(sampled)}")
        if sampled.is_floating_point() or sampled.is_complex() or sampled.dtype == torch.bool:
            raise TypeError(f"sampler must return integer ids; got {sampled.dtype}")
        if sampled.shape != ids.shape:
            raise ValueError(f"sampler must return one id per sample, shape ({len(ids)},); got {tuple(sampled.shape)}")
        checks.below("ids from the sampler", sampled, next_logits.shape[1])
        ids = torch.where(finished, ids, sampled)
        yield ids
        finished = finished | torch.isin(ids, stops)
        if number == max_new_tokens or (stop_ids and bool(finished.all())):
            return
        sequence.append(ids)


def _recomputed(sequence: _Sequence) -> Iterator[Float[Tensor, "b v"]]:
    """Yield the logits `b v` of each new token, computed from the whole sequence without caches."""
    for num_latents in sequence.schedule:
        yield sequence.model(sequence.ids, mask=sequence.mask, num_latents=num_latents)[:, -1]


def _cached(sequence: _Sequence) -> Iterator[Float[Tensor, "b v"]]:
    """Yield the same logits as `_recomputed`, computed with caches.

    The cross-attention keys and values of each token are computed only once. The latents are recomputed each time their
    number restarts. Each time the sequence drops its oldest token, all caches are cleared, because cached latents
    depend on the dropped token and because the positions change.
    """
    num_layers = cast(LatentTransformer, sequence.model.latent_transformer).num_layers
    cache, before = KeysValuesCache(), 0
    for planned in sequence.schedule:
        n = sequence.ids.shape[1]
        if sequence.shifted:
            cache = KeysValuesCache()
        num_new = n if cache.memory is None else 1
        window_starts = cache.memory is None or planned <= before
        if window_starts:
            latent_caches = [KeysValuesCache() for _ in range(num_layers)]
        num_latents = min(planned, n)
        num_queries, before = num_latents if window_starts else 1, planned
        ids, mask = sequence.last(count := max(num_queries, num_new))
        indices, positions = sequence.indices(count)
        read, process = sequence.attention_mask(num_queries, n), sequence.attention_mask(num_queries, num_latents)
        queries, tokens = positions[-num_queries:], positions[-num_new:]
        step = DecodingStep(
            indices,
            num_new,
            cross_attention={"mask": read, "positions": queries, "token_positions": tokens, "cache": cache},
            latent_transformer={"mask": process, "positions": queries, "caches": latent_caches},
        )
        yield sequence.model(ids, mask=mask, num_latents=num_queries, step=step)[:, 0]


def _check_parts(model: PerceiverAR, sampler: Sampler, generator: torch.Generator | None) -> None:
    """Check that `model` is a `PerceiverAR` in evaluation mode, and check the types of `sampler` and `generator`."""
    required = ("vocab_size", "num_latents", "embedding", "latent_transformer", "training")
    if missing := [name for name in required if not hasattr(model, name)]:
        raise TypeError(f"model must be a PerceiverAR, or have its attributes {', '.join(missing)}; got {shown(model)}")
    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout; call model.eval()")
    if isinstance(sampler, type) or not callable(sampler):
        raise TypeError(
            "sampler must be a function of logits and a generator, such as sampling.greedy or sampling.Sample(); "
            f"got {shown(sampler)}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {generator!r}. Build one: torch.Generator()")


def _checked_stop_ids(stop_ids: int | Collection[int], vocab_size: int) -> tuple[int, ...]:
    """Check that the stop ids are in the vocabulary, and return them as a tuple."""
    if isinstance(stop_ids, str) or not isinstance(stop_ids, (int, Iterable)) or getattr(stop_ids, "ndim", 1) == 0:
        raise TypeError(f"stop_ids must be an id or a collection of ids; got {stop_ids!r}")
    ids = (stop_ids,) if isinstance(stop_ids, int) else tuple(stop_ids)
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocab_size:
            raise ValueError(f"stop_ids must be ids of the vocabulary, 0 ... {vocab_size - 1}; got {number!r}")
    return ids
