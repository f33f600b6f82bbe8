"""On a GPU: a training step of the ImageNet Perceiver (forward, mean of squares, backward, norm of the gradients).

Ours and other libraries', each also under torch.compile: weights in float32, the forward pass under torch.autocast in
bfloat16. All are held against one in float32 throughout, which at the larger batch is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import flops, models, peers, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, compete_all
from benchmarks.models import Entry, Models, State

AUTOCAST, COMPILED = ", autocast", ", compiled"  # what the names of candidates say
BATCHES = (8, 32)


class Kind(NamedTuple):
    """A model in several libraries, with the same weights."""

    name: str
    models: Callable[[], Models]
    libraries: tuple[str, ...]
    channels_last: bool = False
    needs: str = "torch"


def kinds(*, toy: bool) -> tuple[Kind, ...]:
    """The paper's model alone, and beside each library in that library's version of it."""
    return (
        Kind("ImageNet", partial(models.imagenet, toy=toy), ("ours", "ours recomputing")),
        Kind(
            "perceiver-pytorch ImageNet",
            partial(peers.perceiver_pytorch, models.TOY if toy else models.IMAGENET),
            ("perceiver-pytorch", "ours"),
            channels_last=True,
            needs="perceiver_pytorch",
        ),
        Kind(
            "transformers trunk",
            partial(peers.transformers, models.TOY_TRUNK if toy else models.TRUNK),
            ("transformers", "ours"),
            needs="transformers",
        ),
    )


def entries(*, toy: bool) -> list[Entry]:
    """Each kind at each batch; in float32 at the smaller one, and there too compiled."""
    side = 20 if toy else 224
    made = []
    for batch in (2,) if toy else BATCHES:
        for kind in kinds(toy=toy):
            exact = kind.libraries[:1] if batch != BATCHES[-1] else ()
            under = [name + AUTOCAST for name in kind.libraries]
            plain = [name for name in under if "recomputing" not in name]
            candidates = (*exact, *under, *(name + COMPILED for name in plain))
            shape = (batch, side, side, 3) if kind.channels_last else (batch, 3, side, side)
            made.append(Entry(kind.name, kind.models, shape, candidates, tasks=("training",), needs=kind.needs))
    return made


def run(setting: Setting) -> Results:
    """Every model, those of libraries that are there."""
    there, notes = models.able(entries(toy=setting.toy))
    return Results(compete_all(map(contest, there), setting), notes)


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="A training step on a GPU, bfloat16 by autocast")


def contest(entry: Entry) -> Contest:
    """One model at one batch."""
    return Contest(
        sizes={"model": entry.name, "batch": entry.shape[0], "task": "training"},
        setup=partial(state, entry),
        candidates={name: _candidate(name) for name in entry.candidates},
        work=partial(models._work, flops.BACKWARD),
        rotates=False,
    )


def state(entry: Entry, device: str) -> State:
    """The models that an entry names, and what they are given; `ours` too, whose work is counted."""
    torch.manual_seed(0)
    made = {name: model.to(device) for name, model in entry.models().items()}
    given = torch.randn(entry.shape).to(device)
    found = {"ours": (made["ours"], given)}
    for name in entry.candidates:
        model = made[name.removesuffix(COMPILED).removesuffix(AUTOCAST)]
        found[name] = (torch.compile(model, dynamic=False) if name.endswith(COMPILED) else model, given)  # type: ignore[assignment]
    return found


def _candidate(name: str) -> Candidate:
    autocast = AUTOCAST in name
    step = partial(models.training, name, autocast=autocast)
    return Candidate(step, "bfloat16" if autocast else "float32", may_refuse=not name.startswith("ours"))
