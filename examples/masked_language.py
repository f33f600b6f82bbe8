"""Masked bytes of programs: a Perceiver IO predicts them, on the source of Python's standard library.

15 % of the bytes of a window are masked, each one independently. 64 latents read the window. A token is the byte at a
position and, by a convolution, the four bytes before and after it. The tokens of masked positions are the queries, so
only these bytes are predicted, by the inner product with the embeddings of all bytes.

    python -m examples.masked_language --out examples/results/masked_language

The baselines count the bytes that occur between the two bytes before and the two after, with the same masks.

Reference: Jaegle et al. 2022 (Perceiver IO), section 4.1 (masked language modeling on bytes).
"""

from __future__ import annotations

import math
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common import text as text_data
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import Rows, compare, markdown_table

MAX_LENGTH = 256  # bytes of a window
MASK = 256  # the id after those of the bytes
IGNORE_INDEX = -100  # the label of bytes that are not masked, as in transformers
MASK_RATE = 0.15
STEPS = 2000
NEIGHBORS = (-1, 1, -2, 2)  # offsets of the neighbors that the counts use, nearest first


def build() -> pc.PerceiverIO:
    """Build the model from masked text to logits of the bytes at masked positions, with 64 latents."""
    text = text_data.ConvTokenEmbedding(
        MASK + 1, 128, num_previous=4, num_next=4, positions=pc.positions.LearnedEmbedding(MAX_LENGTH, 128)
    )
    read = partial(pc.CrossAttend, num_heads=8)
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2)))
    encoder = pc.Encoder(
        text.dim, num_latents=64, dim=128, depth=3, num_heads=4, cross_attention=read, latent_transformer=transformer
    )
    queries = pc.queries.FromInputs(text.dim)
    output_read = partial(pc.CrossAttend, residual=True, mlp=partial(pc.MLP, widening_factor=4))
    decoder = pc.Decoder(encoder.dim, query_dim=queries.dim, out_dim=text.dim, num_heads=8, cross_attention=output_read)
    return pc.PerceiverIO(text, encoder, queries, decoder, pc.heads.TiedLogits)


def mask_bytes(windows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Mask 15 % of the bytes of each window `b n`.

    Returns:
        Ids with `MASK` at masked positions, and labels: the original byte there, `IGNORE_INDEX` elsewhere.
    """
    num_masked = max(1, round(MASK_RATE * windows.shape[1]))  # the same number in each window
    index = torch.rand(windows.shape, generator=generator).argsort(1)[:, :num_masked]
    ids = windows.long()
    return ids.scatter(1, index, MASK), torch.full_like(ids, IGNORE_INDEX).scatter(1, index, ids.gather(1, index))


def masked_positions(labels: Tensor) -> Tensor:
    """Positions of masked bytes, `b q`; each sample has the same number of them."""
    return (labels != IGNORE_INDEX).nonzero()[:, 1].view(len(labels), -1)


def loss(model: nn.Module, text: Tensor, batch: int = 16) -> Tensor:
    """Cross-entropy of masked bytes in random windows; a quarter of the batches are shorter than `MAX_LENGTH`."""
    length = MAX_LENGTH if torch.rand(()) < 0.75 else int(torch.randint(16, MAX_LENGTH, ()))
    windows = text[torch.randint(len(text) - length + 1, (batch, 1)) + torch.arange(length)]
    ids, labels = mask_bytes(windows)
    index = masked_positions(labels)
    return F.cross_entropy(model(ids, query_inputs=index).mT, labels.gather(1, index))


@torch.no_grad()
def predict(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely byte at each masked position, and the bits of the original byte, both `n q`."""
    logits = torch.cat(
        [model(x, query_inputs=masked_positions(y)) for x, y in zip(ids.split(64), labels.split(64), strict=True)]
    )
    bits = F.cross_entropy(logits.mT, labels.gather(1, masked_positions(labels)), reduction="none") / math.log(2)
    return logits[..., :MASK].argmax(-1), bits


def neighbors(ids: Tensor) -> Tensor:
    """Neighbors of each id `b n`, nearest first: `b n 4`. Positions outside of the windows count as masked."""
    padded, n = F.pad(ids, (2, 2), value=MASK), ids.shape[1]
    return torch.stack([padded[:, 2 + step : 2 + step + n] for step in NEIGHBORS], dim=-1)


def fit_counts(train_text: Tensor, order: int) -> text_data.WittenBellModel:
    """Fit counts of bytes between their nearest neighbors, masked at the rate of the test.

    Args:
        train_text: Training bytes.
        order: Number of neighbors of a context.
    """
    masked = torch.rand(train_text.shape, generator=torch.Generator().manual_seed(1)) < MASK_RATE
    contexts = neighbors(train_text.short().masked_fill(masked, MASK)[None])[0, :, :order]
    return text_data.WittenBellModel(contexts.numpy(), train_text.numpy())


def accuracy_by_length(model: nn.Module, text: Tensor) -> dict[int, float]:
    """Share of masked bytes that are predicted correctly, in percent, by the length of the sequences."""
    accuracies = {}
    for length in (16, 32, 64, 128, MAX_LENGTH):
        ids, labels = mask_bytes(text.unfold(0, length, MAX_LENGTH), torch.Generator().manual_seed(length))
        correct = predict(model, ids, labels)[0] == labels.gather(1, masked_positions(labels))
        accuracies[length] = 100 * correct.double().mean().item()
    return accuracies


def draw_windows(axes: Axes, ids: Tensor, labels: Tensor, predicted: Tensor, width: int = 86) -> None:
    """Draw windows in lines of `width` bytes, with the predictions of masked bytes, and the truth below wrong ones."""
    marks = {"\n": "\u00b6", " ": "\u00b7"}
    completed = ids.scatter(1, masked_positions(labels), predicted)
    lines = -(-ids.shape[1] // width)
    for row, (window, truth) in enumerate(zip(completed, labels, strict=True)):
        for position, (byte, label) in enumerate(zip(window.tolist(), truth.tolist(), strict=True)):
            line, x = divmod(position, width)
            y = 2 * (line + row * (lines + 0.5))
            style = {"family": "monospace", "fontsize": 9, "ha": "center", "va": "center", "parse_math": False}
            character = chr(byte) if 32 <= byte < 127 else marks.get(chr(byte), "\ufffd")
            if label == IGNORE_INDEX:
                axes.text(x, y, "" if byte == 32 else character, color="dimgray", **style)
                continue
            correct = byte == label
            color = "tab:green" if correct else "tab:red"
            axes.text(x, y, marks.get(character, character), color=color, weight="bold", **style)
            if not correct:
                character = chr(label) if 32 <= label < 127 else marks.get(chr(label), "\ufffd")
                axes.text(x, y + 0.85, marks.get(character, character), color="black", **{**style, "fontsize": 7})
    axes.set(xlim=(-1, width), ylim=(2 * len(ids) * (lines + 0.5) - 0.5, -1.5))
    axes.axis("off")
    axes.set_title(
        "held-out windows: predictions of masked bytes, green if correct; else red with the truth below", fontsize=9
    )


def draw(tables: dict[str, Rows], lengths: dict[int, float], windows: tuple[Tensor, Tensor, Tensor]) -> Figure:
    """Plot some windows, the scores of each method, and the accuracy by length of the sequence.

    Args:
        tables: Rows of scores by their unit.
        lengths: Accuracy in percent by the length of the sequence.
        windows: Ids, labels and predictions of the windows to show.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    window_figure, score_figure = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    draw_windows(window_figure.subplots(), *windows)
    panels = score_figure.subplots(1, 3)
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


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train the model, compare it with the baselines, and write result and figure."""
    run = Run("masked_language", __doc__, arguments)
    text = text_data.load(toy=run.toy)
    model = run.train("Perceiver IO", build(), partial(loss, text=text.train), steps=3 if run.toy else STEPS, lr=3e-3)
    ids, labels = mask_bytes(text.test.unfold(0, MAX_LENGTH, MAX_LENGTH), torch.Generator().manual_seed(0))
    index = masked_positions(labels)
    targets = labels.gather(1, index)
    contexts = neighbors(ids).gather(1, index[..., None].expand(-1, -1, len(NEIGHBORS))).flatten(0, 1).numpy()
    outputs = {}
    for name, order in {"most frequent byte": 0, "counts, two neighbors": 2, "counts, four neighbors": 4}.items():
        counts, known = fit_counts(text.train, order), contexts[:, :order]
        bits = counts.bits(known, targets.flatten().numpy())
        outputs[name] = counts.most_likely(known).view(targets.shape), bits.view(targets.shape)
    outputs["Perceiver IO"] = predict(model, ids, labels)
    correct = {
        name: text_data.chunk_means(100.0 * (predicted == targets), MAX_LENGTH)
        for name, (predicted, _) in outputs.items()
    }
    costs = {name: text_data.chunk_means(bits, MAX_LENGTH) for name, (_, bits) in outputs.items()}
    tables = {
        "correct, %": compare(correct, ours="Perceiver IO"),
        "bits per masked byte": compare(costs, ours="Perceiver IO", best=min),
    }
    for unit, rows in tables.items():
        print(markdown_table(rows, unit))
    lengths = accuracy_by_length(model, text.test)
    shown = torch.arange(3) * (len(ids) // 3)
    figure = draw(tables, lengths, (ids[shown], labels[shown], outputs["Perceiver IO"][0][shown]))
    data = {**text.sizes(), "windows": len(ids), "masked": targets.numel(), "pieces": len(correct["Perceiver IO"])}
    return run.finish(
        figure, tables=tables, data=data, correct_by_length={str(length): share for length, share in lengths.items()}
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
