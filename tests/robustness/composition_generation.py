"""Random sequences generated with Perceiver AR, with and without caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import perceiver_core as pc
from perceiver_core.models import sampling, stream
from tests.robustness.composition_bounds import FACTORS, epsilon_of, largest
from tests.robustness.composition_draws import Draw
from tests.robustness.composition_models import Case


def generated(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare the ids and logits of generation with caches and without."""
    model, longest = case.model.eval(), getattr(case.model.embedding, "length", None)
    options: dict[str, Any] = {"max_new_tokens": draw.size(1, 12)}
    if "mask" in case.options:
        options["mask"] = case.options["mask"]
    if draw.flag():
        options["num_initial_latents"] = draw.random.randint(1, model.num_latents)
    if draw.flag():
        options["context_length"] = draw.random.randint(1, min(longest or 12, 12))
    if draw.flag(0.3):
        options["stop_ids"] = draw.choice(0, [0, model.vocab_size - 1], {0})
    sampler = sampling.greedy
    if draw.flag():
        top_k = draw.choice(None, draw.size(1, 14))
        sampler = draw.make(
            sampling.Sample, temperature=draw.choice(0.5, 1.0, 1e-9), top_k=top_k, top_p=draw.choice(1.0, 0.7)
        )
    _, options = draw._recorded(pc.generate, (), options)
    draw.used.add("perceiver_core.models.generate.stream")
    ids: dict[bool, Tensor] = {}
    logits: dict[bool, list[Tensor]] = {False: [], True: []}
    for cached in (False, True):

        def forced(scores: Tensor, generator: torch.Generator | None, cached: bool = cached) -> Tensor:
            """Record the logits. With caches, reuse the ids sampled without them, as rounding could change the ids."""
            logits[cached].append(scores)
            step = len(logits[True]) - 1
            return ids[False][:, step] if cached and step < ids[False].shape[1] else sampler(scores, generator)

        generator = torch.Generator().manual_seed(3)
        steps = stream(model, case.inputs, sampler=forced, use_cache=cached, generator=generator, **options)
        ids[cached] = torch.stack(list(steps), dim=1)
    assert ids[True].shape == ids[False].shape, (
        f"{tuple(ids[True].shape)} with caches, {tuple(ids[False].shape)} without"
    )
    assert 1 <= ids[True].shape[1] <= options["max_new_tokens"], f"{tuple(ids[True].shape)} new ids"
    assert ((ids[True] >= 0) & (ids[True] < model.vocab_size)).all(), "ids out of the vocabulary"
    for step, (a, b) in enumerate(zip(logits[True], logits[False], strict=True)):
        assert a.isfinite().all(), f"logits of step {step} are not finite"
        off, bound = (
            largest(a.double() - b.double()),
            8 * FACTORS[draw.dtype] * epsilon_of(draw.dtype) * (1 + largest(b)),
        )
        assert off <= bound, f"logits of step {step} are off by {off:.2e} with caches, bound {bound:.2e}"
    return True
