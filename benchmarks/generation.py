"""Generation with Perceiver AR: so many ids after a long prompt, with keys and values kept and without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import perceiver_core as pc
from benchmarks import flops, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete_all
from perceiver_core.models.generate import plan


class Sizes(NamedTuple):
    """Of a model and what it continues."""

    prompt: int
    new: int
    latents: int
    dim: int
    depth: int
    heads: int
    vocabulary: int = 256


TOY = (Sizes(prompt=11, new=5, latents=6, dim=16, depth=2, heads=2),)
FULL = (
    Sizes(prompt=1024, new=64, latents=256, dim=512, depth=6, heads=8),
    Sizes(prompt=8192, new=32, latents=256, dim=512, depth=6, heads=8),
)

State = tuple[pc.PerceiverAR, Tensor, Sizes]


def run(setting: Setting) -> Results:
    """Both ways at every size."""
    return Results(compete_all(map(contest, TOY if setting.toy else FULL), setting), [])


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="Generation with Perceiver AR")


def contest(sizes: Sizes) -> Contest:
    """One size. Both ways have to foretell the same logits."""
    return Contest(
        sizes={**sizes._asdict(), "task": "generation"},
        setup=partial(state, sizes),
        candidates={name: Candidate(partial(generate, name == "cached")) for name in ("recomputed", "cached")},
        work=_work,
        rotates=False,
    )


def state(sizes: Sizes, device: str) -> State:
    """A model and a prompt."""
    torch.manual_seed(0)
    embed = pc.adapters.TokenEmbedding(sizes.vocabulary, dim=sizes.dim)
    model = pc.PerceiverAR(embed, num_latents=sizes.latents, depth=sizes.depth, num_heads=sizes.heads)
    return model.eval().to(device), torch.randint(sizes.vocabulary, (1, sizes.prompt)).to(device), sizes


@torch.no_grad()
def generate(cache: bool, given: State) -> Tensors:
    """The logits of every new id, of which the same one is said each time, so that rounding decides nothing."""
    model, prompt, sizes = given
    seen: list[Tensor] = []

    def same(logits: Tensor, _: torch.Generator | None) -> Tensor:
        seen.append(logits)
        return torch.full_like(logits[:, 0], len(seen) % sizes.vocabulary, dtype=torch.long)

    pc.generate(model, prompt, max_new_tokens=sizes.new, sampler=same, use_cache=cache)
    return (torch.stack(seen),)


def _work(given: State) -> Work:
    """What is computed without anything kept: for each id, the read of all tokens and the latents that there are."""
    model, _, sizes = given
    counts = plan(sizes.latents, max(1, sizes.latents // 2))
    total = 0
    for step, latents in zip(range(sizes.new), counts, strict=False):
        total += flops.read(model.cross_attention, latents=latents, tokens=sizes.prompt + step)
        total += flops.transformer(model.latent_transformer, latents=latents)
    return Work(flops=total)
