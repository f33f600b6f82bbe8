"""Masked bytes of programs: Perceiver IO says what stood there, on the source of Python's standard library.

15 % of the bytes of a window are masked, each one by itself. 64 latents read the window. A token is what stands at a
place and, by a convolution, the four bytes before and after it; the tokens of masked places are the queries, so only
these are asked for. An answer is compared with the vectors of all bytes.

    python -m examples.masked_language --out examples/results/masked_language

The baselines count what stood between the two bytes before and the two after, with the same masks.

Reference: Jaegle et al. 2022 (Perceiver IO), section 4.1 (masked language modeling on bytes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples import _run, _text

LONGEST = 256  # bytes of a window
MASK = 256  # the id after those of the bytes
IGNORED = -100  # the label of what is not masked, as in transformers
SHARE = 0.15
STEPS = 2000
AROUND = (-1, 1, -2, 2)  # what the counts look at, nearest first


def build() -> pc.PerceiverIO:
    """The model: ids, their neighbors and positions to latents; a token, to a logit for each id."""
    text = _text.Near(MASK + 1, 128, back=4, ahead=4, positions=pc.positions.LearnedEmbedding(LONGEST, 128))
    read = partial(pc.CrossAttend, num_heads=8)
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(text.dim, num_latents=64, dim=128, depth=3, num_heads=4, cross_attention=read, latent_transformer=process)
    ask = pc.queries.FromInputs(text.dim)
    answer = partial(pc.CrossAttend, residual=True, mlp=partial(pc.MLP, widening_factor=4))
    decoder = pc.Decoder(encoder.dim, query_dim=ask.dim, out_dim=text.dim, num_heads=8, cross_attention=answer)
    return pc.PerceiverIO(text, encoder, ask, decoder, pc.heads.TiedLogits)


def masked(windows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Windows `b n` with 15 % of their bytes masked, and labels: the bytes that were there, else ignored."""
    count = max(1, round(SHARE * windows.shape[1]))  # as many in each
    at = torch.rand(windows.shape, generator=generator).argsort(1)[:, :count]
    ids = windows.long()
    return ids.scatter(1, at, MASK), torch.full_like(ids, IGNORED).scatter(1, at, ids.gather(1, at))


def asked(labels: Tensor) -> Tensor:
    """The places of labels that count, `b q`; as many in each sample."""
    return (labels != IGNORED).nonzero()[:, 1].view(len(labels), -1)


def loss(model: nn.Module, text: Tensor, batch: int = 16) -> Tensor:
    """The cross-entropy of masked bytes in windows drawn at random, every fourth batch shorter than the longest."""
    length = LONGEST if torch.rand(()) < 0.75 else int(torch.randint(16, LONGEST, ()))
    windows = text[torch.randint(len(text) - length + 1, (batch, 1)) + torch.arange(length)]
    ids, labels = masked(windows)
    at = asked(labels)
    return F.cross_entropy(model(ids, query_inputs=at).mT, labels.gather(1, at))


@torch.no_grad()
def answers(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the model takes each masked byte for, and what the right one costs in bits, both `n q`."""
    logits = torch.cat([model(x, query_inputs=asked(y)) for x, y in zip(ids.split(64), labels.split(64), strict=True)])
    costs = F.cross_entropy(logits.mT, labels.gather(1, asked(labels)), reduction="none") / math.log(2)
    return logits[..., :MASK].argmax(-1), costs


def around(ids: Tensor) -> Tensor:
    """What stands around each id `b n`, nearest first: `b n 4`. Outside of the windows all is masked."""
    padded, n = F.pad(ids, (2, 2), value=MASK), ids.shape[1]
    return torch.stack([padded[:, 2 + step : 2 + step + n] for step in AROUND], dim=-1)


def count(seen: Tensor, order: int) -> _text.Counts:
    """Counts of what stood between so many neighbors, of which training masks as many as the test does."""
    hidden = torch.rand(seen.shape, generator=torch.Generator().manual_seed(1)) < SHARE
    contexts = around(seen.short().masked_fill(hidden, MASK)[None])[0, :, :order]
    return _text.Counts(contexts.numpy(), seen.numpy())


def by_length(model: nn.Module, text: Tensor) -> dict[int, float]:
    """The share of masked bytes that are right in sequences of several lengths, in percent."""
    found = {}
    for length in (16, 32, 64, 128, LONGEST):
        ids, labels = masked(text.unfold(0, length, LONGEST), torch.Generator().manual_seed(length))
        right = answers(model, ids, labels)[0] == labels.gather(1, asked(labels))
        found[length] = 100 * right.double().mean().item()
    return found


def spell(axes: Any, ids: Tensor, labels: Tensor, guesses: Tensor, wide: int = 86) -> None:
    """Some windows in lines, with what the model says for the masked bytes; below it the truth where it is wrong."""
    marks = {"\n": "\u00b6", " ": "\u00b7"}
    said = ids.scatter(1, asked(labels), guesses)
    lines = -(-ids.shape[1] // wide)
    for row, (window, truth) in enumerate(zip(said, labels, strict=True)):
        for place, (byte, label) in enumerate(zip(window.tolist(), truth.tolist(), strict=True)):
            line, x = divmod(place, wide)
            y = 2 * (line + row * (lines + 0.5))
            style = {"family": "monospace", "fontsize": 9, "ha": "center", "va": "center", "parse_math": False}
            character = chr(byte) if 32 <= byte < 127 else marks.get(chr(byte), "\ufffd")
            if label == IGNORED:
                axes.text(x, y, "" if byte == 32 else character, color="dimgray", **style)
                continue
            right = byte == label
            color = "tab:green" if right else "tab:red"
            axes.text(x, y, marks.get(character, character), color=color, weight="bold", **style)
            if not right:
                character = chr(label) if 32 <= label < 127 else marks.get(chr(label), "\ufffd")
                axes.text(x, y + 0.85, marks.get(character, character), color="black", **{**style, "fontsize": 7})
    axes.set(xlim=(-1, wide), ylim=(2 * len(ids) * (lines + 0.5) - 0.5, -1.5))
    axes.axis("off")
    axes.set_title(
        "held-out windows: masked bytes as the model says, green where right; else the truth below", fontsize=9
    )


def draw(tables: dict[str, Any], lengths: dict[int, float], shown: tuple[Tensor, Tensor, Tensor]) -> Any:
    """Some windows, what is right, what it costs, and sequences of several lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    spell(above.subplots(), *shown)
    panels = below.subplots(1, 3)
    for axes, (unit, rows) in zip(panels, tables.items(), strict=False):
        bars = {name: row for name, row in rows.items() if " less " not in name}
        colors = ["tab:blue" if name.startswith("Perceiver") else "silver" for name in bars]
        axes.barh(list(bars), [row["mean"] for row in bars.values()], color=colors)
        for y, row in enumerate(bars.values()):
            axes.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1.5)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
    panels[1].set_yticks([])
    panels[2].plot(list(lengths), list(lengths.values()), marker="o", color="tab:blue")
    panels[2].set_xscale("log", base=2)
    panels[2].set_xticks(list(lengths), list(lengths))
    panels[2].set(xlabel="bytes of a sequence", ylabel="correct, %", ylim=(0, 100))
    panels[2].grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, compares, draws, and writes the result."""
    run = _run.Run("masked_language", __doc__, arguments)
    text = _text.load(toy=run.toy)
    model = run.train("Perceiver IO", build(), partial(loss, text=text.seen), steps=3 if run.toy else STEPS, lr=3e-3)
    ids, labels = masked(text.unseen.unfold(0, LONGEST, LONGEST), torch.Generator().manual_seed(0))
    at = asked(labels)
    wanted = labels.gather(1, at)
    contexts = around(ids).gather(1, at[..., None].expand(-1, -1, len(AROUND))).flatten(0, 1).numpy()
    found = {}
    for name, order in {"most frequent byte": 0, "counts, two neighbors": 2, "counts, four neighbors": 4}.items():
        counts, given = count(text.seen, order), contexts[:, :order]
        bits = counts.bits(given, wanted.flatten().numpy())
        found[name] = counts.best(given).view(wanted.shape), bits.view(wanted.shape)
    found["Perceiver IO"] = answers(model, ids, labels)
    right = {name: _text.pieces(100.0 * (said == wanted), LONGEST) for name, (said, _) in found.items()}
    costs = {name: _text.pieces(bits, LONGEST) for name, (_, bits) in found.items()}
    tables = {
        "correct, %": _run.compare(right, ours="Perceiver IO"),
        "bits per masked byte": _run.compare(costs, ours="Perceiver IO", best=min),
    }
    for unit, rows in tables.items():
        print(_run.table(rows, unit))
    lengths = by_length(model, text.unseen)
    some = torch.arange(3) * (len(ids) // 3)
    figure = draw(tables, lengths, (ids[some], labels[some], found["Perceiver IO"][0][some]))
    data = {**text.sizes(), "windows": len(ids), "masked": wanted.numel(), "pieces": len(right["Perceiver IO"])}
    return run.finish(
        figure, tables=tables, data=data, correct_by_length={str(length): share for length, share in lengths.items()}
    )


if __name__ == "__main__":
    main()
