"""Generation with Perceiver AR after a long prompt, with and without cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import perceiver_core as pc
from benchmarks.comparison import Candidate, Comparison, Row, Setting, Tensors, Work, compare_all, count_flops

TITLE = "Generation with Perceiver AR"


class Sizes(NamedTuple):
    """Sizes of a model and of the sequence."""

    prompt: int
    new: int
    num_latents: int
    dim: int
    depth: int
    num_heads: int
    vocab_size: int = 256


TOY = (Sizes(prompt=11, new=5, num_latents=6, dim=16, depth=2, num_heads=2),)
FIRST = Sizes(prompt=1024, new=64, num_latents=256, dim=512, depth=6, num_heads=8)
FULL = (FIRST, FIRST._replace(prompt=8192, new=32))

State = tuple[pc.PerceiverAR, Tensor, Sizes]


def run(setting: Setting) -> Iterator[Row]:
    """Compare both modes at every size."""
    return compare_all(map(comparison, TOY if setting.toy else FULL), setting)


def comparison(sizes: Sizes) -> Comparison:
    """Compare both modes at one size; they have to predict the same logits."""
    return Comparison(
        sizes={**sizes._asdict(), "task": "generation"},
        setup=partial(setup, sizes),
        candidates={name: Candidate(partial(generate, name == "cached")) for name in ("recomputed", "cached")},
        work=lambda _: Work(count_flops(generate, False, setup(sizes, "meta"))),
        rotates=False,
    )


def setup(sizes: Sizes, device: str) -> State:
    """Make a model and a prompt."""
    torch.manual_seed(0)
    embedding = pc.adapters.TokenEmbedding(sizes.vocab_size, dim=sizes.dim)
    model = pc.PerceiverAR(embedding, num_latents=sizes.num_latents, depth=sizes.depth, num_heads=sizes.num_heads)
    return model.eval().to(device), torch.randint(sizes.vocab_size, (1, sizes.prompt)).to(device), sizes


@torch.no_grad()
def generate(cache: bool, state: State) -> Tensors:
    """Return the logits of every new id; the ids are fixed, so that rounding decides nothing."""
    model, prompt, sizes = state
    seen: list[Tensor] = []

    def fixed(logits: Tensor, _: torch.Generator | None) -> Tensor:
        seen.append(logits)
        return torch.full_like(logits[:, 0], len(seen) % sizes.vocab_size, dtype=torch.long)

    pc.generate(model, prompt, max_new_tokens=sizes.new, sampler=fixed, use_cache=cache)
    return (torch.stack(seen),)
