"""Generation with Perceiver AR, token by token, with cached keys and values.

Each new token becomes one more latent, so its keys and values are appended to the caches. When the number of latents
has reached its maximum, a new window starts: latents are recomputed for the last `num_initial_latents` tokens only, and
their number grows again. Cached keys and values of the cross-attention do not depend on latents and are kept. The
schedule is the same without caches, so both give the same logits.

Once the sequence is longer than `context_length`, each new token drops the oldest one. Cached latents then depend on a
dropped token, so everything is recomputed for each token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import cycle
from typing import cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from perceiver_core import checks, masks
from perceiver_core.blocks import LatentTransformer
from perceiver_core.models.generation_checks import (
    check_parts,
    check_sampled,
    checked_context_length,
    checked_stop_ids,
)
from perceiver_core.models.perceiver_ar import DecodingStep, PerceiverAR, causal
from perceiver_core.models.sampling import Sampler, greedy
from perceiver_core.reads import KeysValuesCache


def generate(  # noqa: PLR0913 (the prompt, its length and all options of the generation)
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
    """Predict the tokens after a prompt, one at a time.

    Args:
        model: Model in evaluation mode.
        prompt: Token ids, at least one per sample. Only the last `context_length` are used.
        max_new_tokens: Maximum number of tokens to generate.
        mask: Valid tokens of the prompt, True = attend; shorter prompts are padded on the left.
        sampler: Function from logits `b v` and the generator to ids `b`, such as `sampling.greedy` or
            `sampling.Sample()`.
        stop_ids: Token id, or ids, that end a sample. A finished sample repeats its last id until all are finished.
        num_initial_latents: Maximum number of latents when a window starts; half of the model's latents by default.
        context_length: Number of last tokens that are attended to, with positions counted from the first of these. By
            default the number of positions of the model's embedding; unlimited if these are unlimited, as with
            `positions.Rotary`. It bounds memory. Beyond it, each token costs as much as without caches: a read of
            `context_length` tokens, and the latents.
        use_cache: Whether keys and values are cached. Without caches everything is recomputed for each token, with the
            same result.
        generator: Random generator of the sampler.

    Returns:
        The new ids; fewer than `max_new_tokens` if all samples finish earlier.

    Raises:
        TypeError: A model, prompt, sampler, stop_ids or generator of another type; ids from the sampler that are not
            integers.
        ValueError: A model in training mode, an empty prompt, ids outside the vocabulary, a mask of another shape or
            with padding elsewhere, numbers out of range, a context longer than the model's positions; a sampler that
            does not return one id per sample.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> embedding = pc.adapters.TokenEmbedding(vocab_size=256, dim=32)
        >>> model = pc.PerceiverAR(embedding, num_latents=8, depth=2, num_heads=4).eval()
        >>> prompt = torch.tensor([list(b"once upon a time")])
        >>> pc.generate(model, prompt, max_new_tokens=20, sampler=pc.models.sampling.Sample(top_p=0.9)).shape
        torch.Size([1, 20])

    Reference: google-research/perceiver-ar, sample_utils.py, `reset_memory`, which also recomputes the latents of a full
    window, with half their number.
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


def stream(  # noqa: PLR0913 (as above)
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
    """Predict the tokens after a prompt, and yield each as soon as it is computed.

    Arguments and errors are those of `generate`. The call itself raises them, except for errors of the sampler's ids.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> embedding = pc.adapters.TokenEmbedding(vocab_size=256, dim=32)
        >>> model = pc.PerceiverAR(embedding, num_latents=8, depth=2, num_heads=4).eval()
        >>> for ids in pc.models.stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5):
        ...     assert ids.shape == (1,)
    """
    check_parts(model, sampler, generator)
    stops = checked_stop_ids(stop_ids, model.vocab_size)
    initial = max(1, model.num_latents // 2) if num_initial_latents is None else num_initial_latents
    checks.ids("prompt", prompt, model.vocab_size)
    if mask is not None:
        checks.is_mask("mask", mask, prompt.shape)
        checks.padded_on_the_left("mask", mask)
    checks.positive(max_new_tokens=max_new_tokens)
    checks.positive(at_most=model.num_latents, num_initial_latents=initial)
    sequence = _Sequence(model, prompt.long(), mask, initial, checked_context_length(model, context_length))
    logits = _cached(sequence) if use_cache else _recomputed(sequence)
    return _sampled(logits, sequence, max_new_tokens, sampler, generator, stops)


def latent_schedule(num_latents: int, num_initial_latents: int) -> Iterator[int]:
    """Yield the maximum number of latents for each new token.

    The schedule does not depend on the prompt, so each sample of a batch follows it as it would alone.

    Example:
        >>> from itertools import islice
        >>> from perceiver_core.models.generate import latent_schedule
        >>> list(islice(latent_schedule(num_latents=6, num_initial_latents=3), 7))
        [3, 4, 5, 6, 3, 4, 5]
    """
    return cycle(range(num_initial_latents, num_latents + 1))


class _Sequence:
    """Prompt and generated tokens, limited to the last `context_length`."""

    def __init__(
        self, model: PerceiverAR, ids: Tensor, mask: Tensor | None, num_initial_latents: int, context_length: int | None
    ) -> None:
        last = slice(0 if context_length is None else -context_length, None)
        self.model, self.context_length = model, context_length
        self.ids, self.mask = ids[:, last], None if mask is None else mask[:, last]
        self.schedule = latent_schedule(model.num_latents, num_initial_latents)
        self.prompt_length = self.ids.shape[1]
        self.shifted = False  # whether the last `append` dropped a token

    def append(self, ids: Int[Tensor, " b"]) -> None:
        self.shifted = self.ids.shape[1] == self.context_length
        kept = slice(int(self.shifted), None)
        self.ids = torch.cat([self.ids[:, kept], ids[:, None]], 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask[:, kept], self.mask.new_ones(len(ids), 1)], 1)

    def valid(self, count: int) -> Tensor | None:
        """Return the mask of the last `count` tokens."""
        return None if self.mask is None else self.mask[:, -count:]

    def positions(self, count: int) -> Tensor:
        """Return the rotary positions of the last `count` tokens; the last token of the prompt has position 0."""
        now = self.ids.shape[1] - self.prompt_length
        return torch.arange(now - count + 1, now + 1, device=self.ids.device)

    def indices(self, count: int) -> Tensor:
        """Return the indices of the last `count` tokens in the sequence, not counting padding."""
        if self.mask is not None:
            return (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]
        n = self.ids.shape[1]
        return torch.arange(n - count, n, device=self.ids.device)

    def attention_mask(self, num_queries: int, num_keys: int) -> masks.Mask | None:
        """Return the causal mask from the last `num_queries` to the last `num_keys` tokens."""
        valid = self.valid(num_keys)
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
    """Yield the ids sampled from each logits, after which these ids are appended to the sequence."""
    ids = sequence.ids[:, -1]
    finished, stops = torch.zeros_like(ids, dtype=torch.bool), ids.new_tensor(stop_ids)
    for number, next_logits in enumerate(logits, 1):
        sampled = sampler(next_logits, generator)
        check_sampled(sampled, next_logits)
        ids = torch.where(finished, ids, sampled)
        yield ids
        finished = finished | torch.isin(ids, stops)
        if number == max_new_tokens or (stop_ids and bool(finished.all())):
            return
        sequence.append(ids)


def _recomputed(sequence: _Sequence) -> Iterator[Float[Tensor, "b v"]]:
    """Yield the logits of each next token, with everything recomputed."""
    for num_latents in sequence.schedule:
        yield sequence.model(sequence.ids, mask=sequence.mask, num_latents=num_latents)[:, -1]


def _cached(sequence: _Sequence) -> Iterator[Float[Tensor, "b v"]]:
    """Yield the same logits from caches: keys and values of each token are computed once, latents once per window.

    Once a token is dropped, the caches are not used: cached latents depend on it, and positions change.
    """
    num_layers = cast(LatentTransformer, sequence.model.latent_transformer).num_layers
    cache, before = KeysValuesCache(), 0
    for planned in sequence.schedule:
        n = sequence.ids.shape[1]
        cache = KeysValuesCache() if sequence.shifted else cache
        num_latents, num_new = min(planned, n), n if cache.memory is None else 1
        if starts := planned <= before or cache.memory is None:  # a window
            latent_caches = [KeysValuesCache() for _ in range(num_layers)]
        num_queries, before = num_latents if starts else 1, planned
        count = max(num_queries, num_new)
        step = DecodingStep(
            indices=sequence.indices(count),
            positions=sequence.positions(count),
            num_new=num_new,
            mask=sequence.attention_mask(num_queries, n),
            latent_mask=sequence.attention_mask(num_queries, num_latents),
            cache=cache,
            latent_caches=latent_caches,
        )
        last = sequence.ids[:, -count:]
        yield sequence.model(last, mask=sequence.valid(count), num_latents=num_queries, step=step)[:, 0]
