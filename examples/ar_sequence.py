"""Copying from far back: Perceiver AR goes on with a sequence whose period is longer than all its latents.

A motif of 23 random notes is repeated over and over. The model has 8 latents, so what comes next stands in none of
them: it has to be read from the prefix, 23 notes back. The same model trained on the last 8 notes alone can only guess.

    python -m examples.ar_sequence

Both read two motifs (the second only their end) and generate two more. Perceiver AR copies all of them; the other finds
one note in 16, as many as there are notes.

Reference: Hawthorne et al. 2022 (Perceiver AR); its published code has such a task, of 131,072 random ids whose second
half mirrors the first (google-research/perceiver-ar, experiment.py, `random_mirrored_131072`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import perceiver_core as pc

NOTES, MOTIF, LATENTS = 16, 23, 8
STEPS = 250
RESULTS = Path(__file__).parent / "results"


def sequences(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Motifs `b length`, each repeated as often as it fits."""
    motifs = torch.randint(NOTES, (batch, MOTIF), generator=generator)
    return motifs.repeat(1, -(-length // MOTIF))[:, :length]


def build() -> pc.PerceiverAR:
    """The model, turned as the published code does it, in all channels and with a base that suits the length."""
    turned = pc.positions.Rotary(base=128, exponents=pc.positions.inclusive)
    attention = partial(pc.MultiHeadAttention, rotary=turned)
    block = partial(pc.SelfAttend, attention=attention, mlp=partial(pc.MLP, widening=2))
    return pc.PerceiverAR(
        pc.adapters.Ids(NOTES, dim=64),
        latents=LATENTS,
        depth=2,
        heads=4,
        read=partial(pc.CrossAttend, heads=2, attention=attention),
        process=partial(pc.LatentTransformer, block=block),
    )


def train(longest: int, *, steps: int, seed: int, batch: int = 32) -> pc.PerceiverAR:
    """A model that has seen sequences of many lengths up to the longest."""
    torch.manual_seed(seed)
    model, generator = build(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.2)
    shortest = min(longest, MOTIF + LATENTS + 1)
    for _ in range(steps):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        loss = model.loss(sequences(batch, length, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def continued_from_latents(model: pc.PerceiverAR, prompt: Tensor, *, steps: int) -> Tensor:
    """What a model says that is given no more than its latents' tokens."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[:, -LATENTS:])[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def draw(truth: Tensor, found: dict[str, Tensor], path: Path) -> None:
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
    replace(path, lambda part: figure.savefig(part, dpi=110, format="png"))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and moves it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Trains both models, prints what they get right, and writes the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the numbers and the picture go")
    options = parser.parse_args(arguments)

    start, steps = time.perf_counter(), 4 if options.toy else STEPS
    whole = train(4 * MOTIF, steps=steps, seed=options.seed)
    short = train(LATENTS + 1, steps=steps, seed=options.seed)
    print(f"trained both in {time.perf_counter() - start:.0f} s")

    unseen = sequences(128, 4 * MOTIF, torch.Generator().manual_seed(options.seed + 1))
    prompt, truth = unseen[:, : 2 * MOTIF], unseen[:, 2 * MOTIF :]
    found = {
        "Perceiver AR": pc.generate(whole, prompt, max_new_tokens=2 * MOTIF),
        "latents alone": continued_from_latents(short, prompt, steps=2 * MOTIF),
    }
    right = {name: 100 * (notes == truth).float().mean().item() for name, notes in found.items()}
    right["chance"] = 100 / NOTES
    for name, percent in right.items():
        print(f"{name:<14} {percent:5.1f} % of {truth.shape[1]} generated notes")
    result = {"right_percent": right, "steps": steps, "seed": options.seed, "motif": MOTIF, "latents": LATENTS}
    replace(options.out / "ar_sequence.json", lambda part: part.write_text(json.dumps(result, indent=2) + "\n"))
    draw(truth, found, options.out / "ar_sequence.png")
    print(f"written: {options.out / 'ar_sequence.json'} and ar_sequence.png")
    return right


if __name__ == "__main__":
    main()
