"""The next byte of a program: Perceiver AR on the source of Python's standard library.

128 latents read the last 512 bytes; a token is a byte and, by a convolution, the seven before it. Whole packages are
held out, chosen by their names; every byte of theirs is scored once, given the 385 to 512 bytes before it.

    python -m examples.byte_language --out examples/results/byte_language

The baselines are counts of what followed the last bytes, and lzma, alone and after it has compressed the training text.
lzma may look back at all that came before, and is one number for the whole text.

Reference: Hawthorne et al. 2022 (Perceiver AR).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples import _run, _text

CONTEXT, LATENTS = 512, 128  # bytes that are read, and of these, how many foretell the byte after them
STEPS = 2600
PROMPT = b"\n    def __init__(self, "


def build() -> pc.PerceiverAR:
    """The model: queries and keys are turned by their positions."""
    read = partial(pc.models.perceiver_ar.CROSS_ATTENTION, num_heads=3)
    return pc.PerceiverAR(_text.Near(256, 192, back=7), num_latents=LATENTS, depth=3, num_heads=3, cross_attention=read)


def loss(model: Any, text: Tensor, batch: int = 8) -> Tensor:
    """The cross-entropy in windows drawn at random, half of which are shorter than the longest."""
    length = CONTEXT if torch.rand(()) < 0.5 else int(torch.randint(LATENTS, CONTEXT, ()))
    return model.loss(text[torch.randint(len(text) - length, (batch, 1)) + torch.arange(length + 1)])


def windows(text: Tensor, length: int = CONTEXT) -> Tensor:
    """What is scored `n length+1`: the last bytes of each window, which are those before the last of the next."""
    return text.unfold(0, length + 1, LATENTS)


@torch.no_grad()
def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """What the last bytes of each window cost, `n latents`."""
    found = [
        F.cross_entropy(model(ids[:, :-1]).mT, ids[:, -LATENTS:].long(), reduction="none") / math.log(2)
        for ids in windows.split(32)
    ]
    return torch.cat(found)


def before(ids: Tensor, count: int, order: int) -> np.ndarray:
    """What stands before each of the last bytes of each window, nearest first, `n*count order`."""
    n = ids.shape[1]
    columns = [ids[:, n - count - 1 - back : n - 1 - back].flatten() for back in range(order)]
    return torch.stack(columns, dim=1).numpy()


def counted(seen: Tensor, windows: Tensor, order: int) -> Tensor:
    """What the last bytes of each window cost by counts of what followed so many bytes."""
    counts = _text.Counts(before(seen[None], len(seen) - order, order), seen[order:].numpy())
    wanted = windows[:, -LATENTS:]
    return counts.bits(before(windows, LATENTS, order), wanted.flatten().numpy()).view(wanted.shape)


def packed(text: Tensor, first: bytes) -> float:
    """Bits for each byte of a text by which what lzma makes of the first text grows."""

    def size(content: bytes) -> int:
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(first + text.numpy().tobytes()) - size(first)) / len(text)


def by_position(model: nn.Module, text: Tensor) -> tuple[Tensor, Tensor]:
    """How many bytes stand before a byte, and what it costs in the mean, in groups of eight."""
    costs = [bits(model, windows(text, length)[::4]).mean(0) for length in range(LATENTS, CONTEXT + 1, LATENTS)]
    return torch.arange(1, CONTEXT + 1).view(-1, 8).double().mean(1), torch.cat(costs).view(-1, 8).mean(1)


def write_on(model: Any, text: Tensor, count: int) -> dict[str, str]:
    """Held-out bytes, and how the model goes on."""
    content = text.numpy().tobytes()
    end = max(content.find(PROMPT, CONTEXT), CONTEXT) + len(PROMPT)
    prompt = torch.tensor([list(content[end - CONTEXT : end])])
    choose, generator = pc.models.sampling.Sample(temperature=0.6), torch.Generator().manual_seed(0)
    ids = pc.generate(model, prompt, max_new_tokens=count, sampler=choose, use_cache=False, generator=generator)
    return {"prompt": readable(prompt[0]), "new": readable(ids[0])}


def readable(ids: Tensor) -> str:
    """Bytes as text; whatever has no sign of its own is one that says so."""
    characters = map(chr, ids.tolist())
    return "".join(c if c == "\n" or " " <= c <= "~" else "\ufffd" for c in characters)


def draw(rows: _run.Rows, positions: tuple[Tensor, Tensor], said: dict[str, str]) -> Any:
    """What bytes cost by each method and by what stands before them, and a sample."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    above, below = left.subplots(2, 1)
    bars = {name: row for name, row in rows.items() if " less " not in name}
    colors = ["tab:blue" if name.startswith("Perceiver") else "silver" for name in bars]
    above.barh(list(bars), [row["mean"] for row in bars.values()], color=colors)
    for y, row in enumerate(bars.values()):
        above.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1.5)
        above.text(row["high"] + 0.1, y, f"{row['mean']:.2f}", va="center", fontsize=8)
    above.set(xlabel="bits per byte", xlim=(0, 9))
    above.invert_yaxis()
    below.plot(*positions, color="tab:blue")
    below.set(xlabel="bytes before it in the window", ylabel="bits per byte", ylim=(0, None))
    below.grid(alpha=0.3)
    lines = said["prompt"].split("\n")[-12:]
    wrapped = [part for line in said["new"].split("\n") for part in (line[i : i + 74] for i in range(0, len(line), 74))]
    style = {"family": "monospace", "fontsize": 8, "va": "top", "parse_math": False, "linespacing": 1.3}
    right.text(0.03, 0.96, "held-out program", fontsize=9, weight="bold", va="top")
    right.text(0.03, 0.92, "\n".join(line[:74] for line in lines), color="gray", **style)
    right.text(0.03, 0.53, "as the model goes on", fontsize=9, weight="bold", va="top")
    right.text(0.03, 0.49, "\n".join(wrapped[:16]), **style)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, compares, draws, and writes the result."""
    run = _run.Run("byte_language", __doc__, arguments)
    text = _text.load(toy=run.toy)
    shown = windows(text.unseen)
    model = run.train("Perceiver AR", build(), partial(loss, text=text.seen), steps=3 if run.toy else STEPS, lr=3e-3)
    costs = {f"counts, order {order}": _text.pieces(counted(text.seen, shown, order), LATENTS) for order in (3, 5)}
    costs["Perceiver AR"] = _text.pieces(bits(model, shown), LATENTS)
    start, long = CONTEXT + 1 - LATENTS, len(costs["Perceiver AR"]) * _text.PIECE
    first, scored = text.unseen[:start], text.unseen[start : start + long]
    for name, known in {"lzma": first, "lzma, after the training text": torch.cat([text.seen, first])}.items():
        costs[name] = torch.full((len(scored) // _text.PIECE,), packed(scored, known.numpy().tobytes()))
    costs["uniform"] = torch.full_like(costs["lzma"], 8.0)
    rows = _run.compare(costs, ours="Perceiver AR", best=min)
    print(_run.table(rows, "bits per byte"))
    said = write_on(model, text.unseen, 40 if run.toy else 500)
    figure = draw(rows, by_position(model, text.unseen), said)
    data = {**text.sizes(), "scored": long, "pieces": len(costs["lzma"])}
    return run.finish(figure, tables={"bits per byte": rows}, data=data, said=said)


if __name__ == "__main__":
    main()
