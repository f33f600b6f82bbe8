"""Generation with Perceiver AR: one id after the other, keys and values of what was read being kept.

Each new token is one more latent, so its keys and values join those that are kept. When the model has no latent left,
the window moves: only the last `start` tokens are latents, computed anew, and their number grows again, while what the
read made of the tokens stays, which depends on no latent. This plan is followed with a cache and without, so both give
the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from perceiver_core import checks
from perceiver_core.attention import masks
from perceiver_core.blocks import KeysValues
from perceiver_core.models.perceiver_ar import PerceiverAR, causal
from perceiver_core.models.sampling import Choice, greedy


def generate(  # noqa: PLR0913 (what to go on from, how far, and how)
    model: PerceiverAR,
    prompt: Shaped[Tensor, "b n"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "b n"] | None = None,
    choose: Choice = greedy,
    stop: Sequence[int] = (),
    start: int | None = None,
    cache: bool = True,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b t"]:
    """The ids that follow a prompt.

    Args:
        model: in evaluation mode.
        prompt: whole numbers, one at least.
        max_new_tokens: how many ids to generate, at most.
        mask: which tokens of the prompt are there, True = attend; shorter prompts are padded on the left.
        choose: from logits `b v` and the generator to ids `b`: `sampling.greedy`, `sampling.Sample`, or your own.
        stop: ids that end a sample. A sample that has ended repeats that id until all have.
        start: how many tokens are latents when a window starts, at most; half of the model's latents unless given.
        cache: whether keys and values are kept. Without, everything is computed again for every id, to the same result.
        generator: what `choose` draws from.

    Returns:
        The new ids; fewer than `max_new_tokens` if all samples ended before.

    Raises:
        TypeError: a prompt that is not of whole numbers.
        ValueError: an empty prompt, ids outside the vocabulary, a mask of another shape or padded elsewhere, numbers
            out of range, more tokens than the model has positions for, a model in training mode.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> model = pc.PerceiverAR(pc.adapters.Ids(vocabulary=256, dim=32), latents=8, depth=2, heads=4).eval()
        >>> prompt = torch.tensor([list(b"once upon a time")])
        >>> pc.generate(model, prompt, max_new_tokens=20, choose=pc.models.sampling.Sample(top_p=0.9)).shape
        torch.Size([1, 20])

    Reference: google-research/perceiver-ar, sample_utils.py, `reset_memory`: there too a full window is computed anew
    with half of its latents.
    """
    options = {"mask": mask, "choose": choose, "stop": stop, "start": start, "cache": cache, "generator": generator}
    return torch.stack(list(stream(model, prompt, max_new_tokens=max_new_tokens, **options)), dim=1)  # type: ignore[arg-type]


def stream(  # noqa: PLR0913 (as above)
    model: PerceiverAR,
    prompt: Shaped[Tensor, "b n"],
    *,
    max_new_tokens: int,
    mask: Bool[Tensor, "b n"] | None = None,
    choose: Choice = greedy,
    stop: Sequence[int] = (),
    start: int | None = None,
    cache: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """The ids that follow a prompt, one step at a time, each as soon as it is there.

    Args and errors, which come with the call, are those of `generate`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> model = pc.PerceiverAR(pc.adapters.Ids(vocabulary=256, dim=32), latents=8, depth=2, heads=4).eval()
        >>> for ids in pc.models.stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5):
        ...     assert ids.shape == (1,)
    """
    start = max(1, model.latents // 2) if start is None else start
    _check(model, prompt, mask, max_new_tokens, stop, start)
    logits = _cached if cache else _recomputed

    def chosen(found: Tensor) -> Tensor:
        return choose(found, generator)

    return _stream(logits, _Stream(model, prompt.long(), mask, start), max_new_tokens, chosen, tuple(stop))


def plan(latents: int, start: int) -> Iterator[int]:
    """How many of the last tokens are latents for each new id, or all where there are fewer.

    It does not depend on the prompt, so samples of a batch follow it together as they would alone.

    Example:
        >>> from itertools import islice
        >>> from perceiver_core.models.generate import plan
        >>> list(islice(plan(latents=6, start=3), 7))
        [3, 4, 5, 6, 3, 4, 5]
    """
    return cycle(range(start, latents + 1))


class _Stream:
    """What has been said so far."""

    def __init__(self, model: PerceiverAR, ids: Tensor, mask: Tensor | None, start: int) -> None:
        self.model, self.ids, self.mask, self.prompt = model, ids, mask, ids.shape[1]
        self.plan = plan(model.latents, start)

    def append(self, ids: Int[Tensor, " b"]) -> None:
        self.ids = torch.cat([self.ids, ids[:, None]], 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)

    def present(self, last: int) -> Tensor | None:
        """Which of the last tokens are there."""
        return None if self.mask is None else self.mask[:, -last:]

    def where(self, last: int) -> Tensor:
        """Where the last tokens stand, the last of the prompt being at 0."""
        now = self.ids.shape[1] - self.prompt
        return torch.arange(now - last + 1, now + 1, device=self.ids.device)

    def tokens(self, last: int) -> Tensor:
        """The last tokens, embedded at their places."""
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
    """The same logits, from what is kept: all tokens are read once, and latents computed once a window."""
    model: Any = so_far.model
    memory: _Memory | None = None
    before = 0
    for planned in so_far.plan:
        n = so_far.ids.shape[1]
        latents, fresh = min(planned, n), memory is None or planned <= before  # or a window starts
        asking, unread = (latents if fresh else 1), (so_far.prompt if memory is None else 1)
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


def _check(
    model: PerceiverAR, prompt: Tensor, mask: Tensor | None, max_new_tokens: int, stop: Sequence[int], start: int
) -> None:
    checks.ids("prompt", prompt, model.vocabulary)
    if mask is not None:
        checks.is_mask("mask", mask, prompt.shape)
        checks.padded_on_the_left("mask", mask)
    checks.positive(max_new_tokens=max_new_tokens)
    checks.positive(at_most=model.latents, start=start)
    for number in stop:
        if not isinstance(number, int) or not 0 <= number < model.vocabulary:
            raise ValueError(f"stop must be ids of the vocabulary, 0 ... {model.vocabulary - 1}; got {number!r}")
    longest, asked = getattr(model.embed, "length", None), prompt.shape[1] + max_new_tokens - 1
    if longest is not None and asked > longest:
        raise ValueError(
            f"prompt and max_new_tokens must leave at most {longest} tokens to read, as many as there are positions; "
            f"got {asked}. Give the end of the prompt, or fewer max_new_tokens"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode, without dropout; call model.eval()")
