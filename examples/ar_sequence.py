"""Copying from far back: Perceiver AR continues a sequence whose period is longer than all of its latents.

A motif of 23 random notes is repeated. The model has 8 latents, so none of their tokens tells the next note: it has to
be read from the prefix, 23 notes back. The same model trained on the last 8 notes alone can only guess.

    python -m examples.ar_sequence --out examples/results/ar_sequence

Both models get two motifs as prompt (the second model only the last 8 notes) and generate two more. Perceiver AR copies
all notes; the other model gets one note in 16 right, which is chance.

Reference: Hawthorne et al. 2022 (Perceiver AR). The published code has a similar task of 131,072 random ids whose
second half mirrors the first (google-research/perceiver-ar, experiment.py, `random_mirrored_131072`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import perceiver_core as pc
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import compare, markdown_table

NOTES, MOTIF, LATENTS = 16, 23, 8
STEPS = 250


def sequences(batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a random motif per sequence and repeat it until the sequence has `length` notes, `b length`."""
    motifs = torch.randint(NOTES, (batch, MOTIF), generator=generator)
    return motifs.repeat(1, -(-length // MOTIF))[:, :length]


def build() -> pc.PerceiverAR:
    """Build the model: rotary positions in all channels, as in the published code, with a base for short sequences."""
    rotary = pc.positions.Rotary(base=128, exponents=pc.positions.inclusive_exponents)
    attention = partial(pc.MultiHeadAttention, rotary=rotary)
    block = partial(pc.SelfAttend, attention=attention, mlp=partial(pc.MLP, widening_factor=2))
    return pc.PerceiverAR(
        pc.adapters.TokenEmbedding(NOTES, dim=64),
        num_latents=LATENTS,
        depth=2,
        num_heads=4,
        cross_attention=partial(pc.CrossAttend, num_heads=2, attention=attention),
        latent_transformer=partial(pc.LatentTransformer, block=block),
    )


def loss(model: pc.PerceiverAR, longest: int, batch: int = 32) -> Tensor:
    """Cross-entropy on a batch of sequences whose common length is drawn at random.

    Args:
        model: Perceiver AR to train.
        longest: Largest length of the sequences.
        batch: Number of sequences.
    """
    shortest = min(longest, MOTIF + LATENTS + 1)
    length = int(torch.randint(shortest, longest + 1, ()))
    return model.loss(sequences(batch, length))


@torch.no_grad()
def continue_from_latents(model: nn.Module, prompt: Tensor, *, steps: int) -> Tensor:
    """Generate greedily with the last 8 tokens, as many as the model has latents, as the only context."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[:, -LATENTS:])[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def draw(truth: Tensor, continuations: dict[str, Tensor]) -> Figure:
    """Plot the accuracy at each new note, and one continuation note by note."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    accuracy_axes, notes_axes = figure.subplots(2, 1, sharex=True)
    styles = {"Perceiver AR": ("tab:blue", "o"), "latents alone": ("tab:orange", "x")}
    steps = range(1, truth.shape[1] + 1)
    for name, notes in continuations.items():
        color, marker = styles[name]
        accuracy_axes.plot(steps, 100 * (notes == truth).float().mean(0), color=color, label=name)
        notes_axes.scatter(steps, notes[0], color=color, marker=marker, s=22, label=name, zorder=3)
    accuracy_axes.axhline(100 / NOTES, color="gray", linestyle=":", label="chance")
    accuracy_axes.set(ylabel="right, percent", ylim=(-4, 104))
    accuracy_axes.legend(loc="center right")
    notes_axes.step(steps, truth[0], where="mid", color="black", linewidth=1, label="truth")
    notes_axes.set(xlabel="note after the prompt", ylabel="note, of one sequence")
    notes_axes.legend(loc="upper right", ncols=3, fontsize=8, framealpha=0.9)
    notes_axes.set_ylim(-1, NOTES + 3)
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train both models, compare them, and write result and figure."""
    run = Run("ar_sequence", __doc__, arguments)
    steps, options = 4 if run.toy else STEPS, {"lr": 3e-3, "decay": 0.9}
    full_model = run.train("Perceiver AR", build(), partial(loss, longest=4 * MOTIF), steps=steps, **options)
    short_model = run.train("latents alone", build(), partial(loss, longest=LATENTS + 1), steps=steps, **options)

    test_set = sequences(128, 4 * MOTIF, torch.Generator().manual_seed(1))
    prompt, truth = test_set[:, : 2 * MOTIF], test_set[:, 2 * MOTIF :]
    continuations = {
        "latents alone": continue_from_latents(short_model, prompt, steps=2 * MOTIF),
        "Perceiver AR": pc.generate(full_model, prompt, max_new_tokens=2 * MOTIF),
    }
    correct = {name: 100 * (notes == truth).double().mean(1) for name, notes in continuations.items()}
    rows = compare(correct, ours="Perceiver AR")
    print(markdown_table(rows, "right, %"))
    sizes = {"notes": NOTES, "motif": MOTIF, "latents": LATENTS, "test": len(test_set), "chance": 100 / NOTES}
    return run.finish(draw(truth, continuations), tables={"right, %": rows}, data=sizes)


if __name__ == "__main__":
    sys.exit(run_command(main))
