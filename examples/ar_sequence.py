"""Copying from far back: Perceiver AR goes on with a sequence whose period is longer than all its latents.

A motif of 23 random notes is repeated over and over. The model has 8 latents, so what comes next stands in none of
them: it has to be read from the prefix, 23 notes back. The same model trained on the last 8 notes alone can only guess.

    python -m examples.ar_sequence --out examples/results/ar_sequence

Both read two motifs (the second only their end) and generate two more. Perceiver AR copies all of them; the other finds
one note in 16, as many as there are notes.

Reference: Hawthorne et al. 2022 (Perceiver AR); its published code has such a task, of 131,072 random ids whose second
half mirrors the first (google-research/perceiver-ar, experiment.py, `random_mirrored_131072`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_core as pc
from examples import _run

NOTES, MOTIF, LATENTS = 16, 23, 8
STEPS = 250


def sequences(batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Motifs `b length`, each repeated as often as it fits."""
    motifs = torch.randint(NOTES, (batch, MOTIF), generator=generator)
    return motifs.repeat(1, -(-length // MOTIF))[:, :length]


def build() -> pc.PerceiverAR:
    """The model, turned as the published code does it, in all channels and with a base that suits the length."""
    turned = pc.positions.Rotary(base=128, exponents=pc.positions.inclusive_exponents)
    attention = partial(pc.MultiHeadAttention, rotary=turned)
    block = partial(pc.SelfAttend, attention=attention, mlp=partial(pc.MLP, widening_factor=2))
    return pc.PerceiverAR(
        pc.adapters.TokenEmbedding(NOTES, dim=64),
        num_latents=LATENTS,
        depth=2,
        num_heads=4,
        cross_attention=partial(pc.CrossAttend, num_heads=2, attention=attention),
        latent_transformer=partial(pc.LatentTransformer, block=block),
    )


def loss(model: nn.Module, longest: int, batch: int = 32) -> Tensor:
    """Cross-entropy of sequences of one of many lengths up to the longest."""
    shortest = min(longest, MOTIF + LATENTS + 1)
    length = int(torch.randint(shortest, longest + 1, ()))
    value: Tensor = model.loss(sequences(batch, length))  # type: ignore[operator]
    return value


@torch.no_grad()
def continued_from_latents(model: nn.Module, prompt: Tensor, *, steps: int) -> Tensor:
    """What a model says that is given no more than its latents' tokens."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[:, -LATENTS:])[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def draw(truth: Tensor, found: dict[str, Tensor]) -> Any:
    """How often each new note is right, and one continuation note by note."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    styles = {"Perceiver AR": ("tab:blue", "o"), "latents alone": ("tab:orange", "x")}
    at = range(1, truth.shape[1] + 1)
    for name, notes in found.items():
        color, marker = styles[name]
        above.plot(at, 100 * (notes == truth).float().mean(0), color=color, label=name)
        below.scatter(at, notes[0], color=color, marker=marker, s=22, label=name, zorder=3)
    above.axhline(100 / NOTES, color="gray", linestyle=":", label="chance")
    above.set(ylabel="right, percent", ylim=(-4, 104))
    above.legend(loc="center right")
    below.step(at, truth[0], where="mid", color="black", linewidth=1, label="truth")
    below.set(xlabel="note after the prompt", ylabel="note, of one sequence")
    below.legend(loc="upper right", ncols=3, fontsize=8, framealpha=0.9)
    below.set_ylim(-1, NOTES + 3)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains both models, compares, draws, and writes the result."""
    run = _run.Run("ar_sequence", __doc__, arguments)
    steps, options = 4 if run.toy else STEPS, {"lr": 3e-3, "decay": 0.9}
    whole = run.train("Perceiver AR", build(), partial(loss, longest=4 * MOTIF), steps=steps, **options)
    short = run.train("latents alone", build(), partial(loss, longest=LATENTS + 1), steps=steps, **options)

    unseen = sequences(128, 4 * MOTIF, torch.Generator().manual_seed(1))
    prompt, truth = unseen[:, : 2 * MOTIF], unseen[:, 2 * MOTIF :]
    found = {
        "latents alone": continued_from_latents(short, prompt, steps=2 * MOTIF),
        "Perceiver AR": pc.generate(whole, prompt, max_new_tokens=2 * MOTIF),
    }
    right = {name: 100 * (notes == truth).double().mean(1) for name, notes in found.items()}
    rows = _run.compare(right, ours="Perceiver AR")
    print(_run.table(rows, "right, %"))
    sizes = {"notes": NOTES, "motif": MOTIF, "latents": LATENTS, "test": len(unseen), "chance": 100 / NOTES}
    return run.finish(draw(truth, found), tables={"right, %": rows}, data=sizes)


if __name__ == "__main__":
    main()
