"""Generation with Perceiver AR: one id after the other, keys and values of what was read being kept.

Each new token is one more latent, so its keys and values join those that are kept. When the model has no latent left,
the window moves: only the last `start` tokens are latents, computed anew, and their number grows again, while what the
read made of the tokens stays, which depends on no latent. This plan is followed with a cache and without, so both give
the same logits.

Once the sequence is longer than the `context` that is to be read, every id moves what is read by one, and nothing kept
is of use: latents have read a token that is there no longer. Then all is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import cycle
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from perceiver_core import checks
from perceiver_core import masks
from perceiver_core.blocks import KeysValues
from perceiver_core.models.perceiver_ar import PerceiverAR, causal
from perceiver_core.models.sampling import Choice, greedy


def generate(  # noqa: PLR0913 (what to go on from, how far, and how)
    model: PerceiverAR,
    prompt: Shaped[Tensor, "b n"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "b n"] | None = None,
    sampler: Choice = greedy,
    stop_ids: int | Collection[int] = (),
    num_initial_latents: int | None = None,
    context_length: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b t"]:
    """The ids that follow a prompt.

    Args:
        model: in evaluation mode.
        prompt: whole numbers, one at least; longer than `context_length`, its end is read.
        max_new_tokens: how many ids to generate, at most.
        mask: which tokens of the prompt are there, True = attend; shorter prompts are padded on the left.
        sampler: from logits `b v` and the generator to ids `b`: `sampling.greedy`, `sampling.Sample`, or your own.
        stop_ids: the id, or ids, that end a sample. A sample that has ended repeats that id until all have.
        num_initial_latents: how many tokens are latents when a window starts, at most; half of the model's latents
            unless given.
        context_length: how many of the last tokens are read, at most: of a longer sequence what a model would make of
            its end alone, positions counted from there. As many as the model has positions for unless given; all where
            these have no end (`positions.Rotary`). Memory is bounded by it. Beyond it, an id costs what it does without
            a
            cache: a read of `context_length` tokens, and the latents.
        use_cache: whether keys and values are kept. Without, everything is computed again for every id, to the same
            result.
        generator: what `sampler` draws from.

    Returns:
        The new ids; fewer than `max_new_tokens` if all samples ended before.

    Raises:
        TypeError: a prompt, or what `sampler` gives, that is not of whole numbers; a model, `sampler`, `stop_ids` or
            generator that is none.
        ValueError: an empty prompt, ids outside the vocabulary, a mask of another shape or padded elsewhere, numbers
            out of range, a context of more tokens than the model has positions for, a model in training mode; not one
            id a sample from `sampler`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> model = pc.PerceiverAR(pc.adapters.TokenEmbedding(vocab_size=256, dim=32), num_latents=8, depth=2, num_heads=4).eval()
        >>> prompt = torch.tensor([list(b"once upon a time")])
        >>> pc.generate(model, prompt, max_new_tokens=20, sampler=pc.models.sampling.Sample(top_p=0.9)).shape
        torch.Size([1, 20])

    Reference: google-research/perceiver-ar, sample_utils.py, `reset_memory`: there too a full window is computed anew
    with half of its latents.
    """
    steps = stream(
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
    return torch.stack(list(steps), dim=1)


def stream(  # noqa: PLR0913 (as above)
    model: PerceiverAR,
    prompt: Shaped[Tensor, "b n"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "b n"] | None = None,
    sampler: Choice = greedy,
    stop_ids: int | Collection[int] = (),
    num_initial_latents: int | None = None,
    context_length: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """The ids that follow a prompt, one step at a time, each as soon as it is there.

    Args and errors, which come with the call but for those of what `sampler` gives, are those of `generate`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> model = pc.PerceiverAR(pc.adapters.TokenEmbedding(vocab_size=256, dim=32), num_latents=8, depth=2, num_heads=4).eval()
        >>> for ids in pc.models.stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5):
        ...     assert ids.shape == (1,)
    """
    _check_parts(model, sampler, generator)
    num_initial_latents = max(1, model.latents // 2) if num_initial_latents is None else num_initial_latents
    ends = _ids_of(stop_ids, model.vocabulary)
    context_length = _check_numbers(model, prompt, mask, max_new_tokens, num_initial_latents, context_length)
    logits = _cached if use_cache else _recomputed

    def chosen(found: Tensor) -> Tensor:
        ids = sampler(found, generator)
        _check_chosen(ids, found)
        return ids

    return _stream(logits, _Stream(model, prompt.long(), mask, num_initial_latents, context_length), max_new_tokens, chosen, ends)


def plan(num_latents: int, num_initial_latents: int) -> Iterator[int]:
    """How many of the last tokens are latents for each new id, or all where there are fewer.

    It does not depend on the prompt, so samples of a batch follow it together as they would alone.

    Example:
        >>> from itertools import islice
        >>> from perceiver_core.models.generate import plan
        >>> list(islice(plan(num_latents=6, num_initial_latents=3), 7))
        [3, 4, 5, 6, 3, 4, 5]
    """
    return cycle(range(num_initial_latents, num_latents + 1))


class _Stream:
    """What has been said so far, as much of it as is read."""

    def __init__(
        self, model: PerceiverAR, ids: Tensor, mask: Tensor | None, start: int, context: int | None = None
    ) -> None:
        last = slice(0 if context is None else -context, None)
        self.model, self.context = model, context
        self.ids, self.mask = ids[:, last], None if mask is None else mask[:, last]
        self.plan, self.first = plan(model.latents, start), self.ids.shape[1]
        self.moved = False  # whether a token that was read before is so no longer

    def append(self, ids: Int[Tensor, " b"]) -> None:
        self.moved = self.ids.shape[1] == self.context
        kept = slice(int(self.moved), None)
        self.ids = torch.cat([self.ids[:, kept], ids[:, None]], 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask[:, kept], self.mask.new_ones(len(ids), 1)], 1)

    def present(self, last: int) -> Tensor | None:
        """Which of the last tokens are there."""
        return None if self.mask is None else self.mask[:, -last:]

    def where(self, last: int) -> Tensor:
        """Where the last tokens stand, the last of those read first being at 0."""
        now = self.ids.shape[1] - self.first
        return torch.arange(now - last + 1, now + 1, device=self.ids.device)

    def tokens(self, last: int) -> Tensor:
        """The last tokens, embedded at their places among those that are read."""
        n, there = self.ids.shape[1], self.present(last)
        index = torch.arange(n - last, n, device=self.ids.device)
        if self.mask is not None:
            index = (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, -last:]
        return self.model.tokens(self.ids[:, -last:], mask=there, positions=index)


class _Memory(NamedTuple):
    """Keys and values: of all tokens in the read, and of the latents so far in every self-attend."""

    tokens: KeysValues
    latents: list[KeysValues]


Logits: TypeAlias = Callable[[_Stream], Iterator[Tensor]]


@torch.no_grad()
def _stream(
    logits: Logits, so_far: _Stream, steps: int, choose: Callable[[Tensor], Tensor], stop: tuple[int, ...]
) -> Iterator[Tensor]:
    ended = torch.zeros(len(so_far.ids), dtype=torch.bool, device=so_far.ids.device)
    ends = torch.tensor(stop, dtype=torch.long, device=so_far.ids.device)
    ids = so_far.ids[:, -1]
    for number, found in enumerate(logits(so_far), 1):
        ids = torch.where(ended, ids, choose(found))
        yield ids
        ended = ended | torch.isin(ids, ends)
        if number == steps or (stop and bool(ended.all())):
            return
        so_far.append(ids)


def _recomputed(so_far: _Stream) -> Iterator[Float[Tensor, "b v"]]:
    """Logits of each next id, everything computed again."""
    for latents in so_far.plan:
        yield so_far.model(so_far.ids, mask=so_far.mask, latents=latents)[:, -1]


def _cached(so_far: _Stream) -> Iterator[Float[Tensor, "b v"]]:
    """The same logits, from what is kept: all tokens are read once, and latents computed once a window.

    Where the first token is no longer read, nothing is: latents have read it, and positions are counted anew.
    """
    model: Any = so_far.model
    memory: _Memory | None = None
    before = 0
    for planned in so_far.plan:
        n, memory = so_far.ids.shape[1], None if so_far.moved else memory
        latents, fresh = min(planned, n), memory is None or planned <= before  # or a window starts
        asking, unread = (latents if fresh else 1), (n if memory is None else 1)
        x = so_far.tokens(max(asking, unread))
        new = model.read.keys_values(x[:, -unread:], positions=so_far.where(unread), queries=asking)
        tokens = new if memory is None else memory.tokens.then(new)
        where, mask = so_far.where(asking), _mask(so_far, asking, n)
        z = model.read(x[:, -asking:], tokens, mask=mask, positions=where)
        known = None if memory is None or fresh else memory.latents
        z, known = model.process.extend(z, known, mask=_mask(so_far, asking, latents), positions=where)
        memory, before = _Memory(tokens, known), planned
        yield model.answer(z[:, -1:])[:, 0]


def _mask(so_far: _Stream, queries: int, keys: int) -> masks.Mask | None:
    """Who of the last `queries` may attend to whom of the last `keys`: one alone to all that are there."""
    present = so_far.present(keys)
    if queries > 1:
        return causal(present)
    return None if present is None else masks.Padding(present)


NEEDED = ("vocabulary", "latents", "embed", "tokens", "read", "process", "answer", "training")


def _check_parts(model: PerceiverAR, choose: Choice, generator: torch.Generator | None) -> None:
    lacking = [name for name in NEEDED if not hasattr(model, name)]
    if lacking:
        raise TypeError(
            f"model must be a PerceiverAR, or have what it has; got {_named(model)} without {', '.join(lacking)}"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout; call model.eval()")
    if isinstance(choose, type) or not callable(choose):
        hint = f". Make one: {choose.__name__}()" if isinstance(choose, type) else ""
        raise TypeError(
            "choose must be a function of logits and a generator, such as sampling.greedy or sampling.Sample(); "
            f"got {_named(choose)}{hint}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator; got {generator!r}. Make one: torch.Generator().manual_seed(3)"
        )


def _ids_of(stop: int | Collection[int], vocabulary: int) -> tuple[int, ...]:
    if isinstance(stop, str) or not isinstance(stop, (int, Iterable)):
        raise TypeError(f"stop must be an id or a collection of ids; got {stop!r}")
    ids = (stop,) if isinstance(stop, int) else tuple(stop)
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < vocabulary:
            raise ValueError(f"stop must be ids of the vocabulary, 0 ... {vocabulary - 1}; got {number!r}")
    return ids


def _check_numbers(
    model: PerceiverAR, prompt: Tensor, mask: Tensor | None, max_new_tokens: int, start: int, context: int | None
) -> int | None:
    """Gives the context, which is what the model has positions for unless it was given."""
    checks.ids("prompt", prompt, model.vocabulary)
    if mask is not None:
        checks.is_mask("mask", mask, prompt.shape)
        checks.padded_on_the_left("mask", mask)
    checks.positive(max_new_tokens=max_new_tokens)
    checks.positive(at_most=model.latents, start=start)
    longest: int | None = getattr(model.embed, "length", None)
    if context is None:
        return longest
    checks.positive(context=context)
    if longest is not None and context > longest:
        raise ValueError(f"context must be at most {longest}, as many as there are positions; got {context}")
    return context


def _check_chosen(ids: Tensor, logits: Float[Tensor, "b v"]) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"choose must give a torch.Tensor of ids; got {_named(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"choose must give ids, whole numbers; got {ids.dtype}")
    if ids.shape != logits.shape[:1]:
        raise ValueError(f"choose must give one id a sample, shape {tuple(logits.shape[:1])}; got {tuple(ids.shape)}")
    checks.below("what choose gives", ids, logits.shape[1])


def _named(x: object) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else repr(x) if isinstance(x, str) else type(x).__name__
