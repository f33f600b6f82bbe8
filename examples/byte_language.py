"""The next byte of a program: Perceiver AR on the source of Python's standard library.

128 latents read the last 512 bytes; a token is a byte and, by a convolution, the seven before it. Whole packages are
held out, chosen by a hash of their names; each of their bytes is scored once, given the 385 to 512 bytes before it.

    python -m examples.byte_language --out examples/results/byte_language

The baselines are counts of the byte that follows each context, and lzma, alone and after it has compressed the training
text. lzma refers back to all of the preceding text, and yields one number for the whole test text.

Reference: Hawthorne et al. 2022 (Perceiver AR).
"""

from __future__ import annotations

import lzma
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

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from examples.common import text as text_data
from examples.common.command import run_command
from examples.common.run import Result, Run
from examples.common.scores import Rows, compare, markdown_table

CONTEXT, LATENTS = 512, 128  # bytes that the model reads, and the last of these, each of which predicts the next byte
STEPS = 2600
PROMPT = b"\n    def __init__(self, "


def build() -> pc.PerceiverAR:
    """Build the model, with rotary positions of queries and keys."""
    read = partial(pc.models.perceiver_ar.CROSS_ATTENTION, num_heads=3)
    return pc.PerceiverAR(
        text_data.ConvTokenEmbedding(256, 192, num_previous=7),
        num_latents=LATENTS,
        depth=3,
        num_heads=3,
        cross_attention=read,
    )


def loss(model: pc.PerceiverAR, text: Tensor, batch: int = 8) -> Tensor:
    """Cross-entropy on random windows of the text; half of the batches are shorter than `CONTEXT`."""
    length = CONTEXT if torch.rand(()) < 0.5 else int(torch.randint(LATENTS, CONTEXT, ()))
    return model.loss(text[torch.randint(len(text) - length, (batch, 1)) + torch.arange(length + 1)])


def windows(text: Tensor, length: int = CONTEXT) -> Tensor:
    """Split a text into overlapping windows `n length+1`, of which the last `LATENTS` bytes are scored.

    The scored bytes of consecutive windows are adjacent, so each byte of the text is scored once.
    """
    return text.unfold(0, length + 1, LATENTS)


@torch.no_grad()
def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Bits of the scored bytes of each window under the model, `n latents`."""
    batches = [
        F.cross_entropy(model(ids[:, :-1]).mT, ids[:, -LATENTS:].long(), reduction="none") / math.log(2)
        for ids in windows.split(32)
    ]
    return torch.cat(batches)


def preceding_bytes(ids: Tensor, count: int, order: int) -> np.ndarray:
    """Context of each of the last `count` bytes of each window, nearest byte first, `n*count order`."""
    n = ids.shape[1]
    columns = [ids[:, n - count - 1 - step : n - 1 - step].flatten() for step in range(order)]
    return torch.stack(columns, dim=1).numpy()


def count_bits(train_text: Tensor, windows: Tensor, order: int) -> Tensor:
    """Bits of the scored bytes of each window by counts of the training bytes that follow each context.

    Args:
        train_text: Training bytes.
        windows: Windows of the test text.
        order: Number of bytes of a context.
    """
    contexts = preceding_bytes(train_text[None], len(train_text) - order, order)
    model = text_data.WittenBellModel(contexts, train_text[order:].numpy())
    targets = windows[:, -LATENTS:]
    return model.bits(preceding_bytes(windows, LATENTS, order), targets.flatten().numpy()).view(targets.shape)


def lzma_bits(text: Tensor, prefix: bytes) -> float:
    """Compressed size that a text adds to a prefix under lzma, in bits per byte of the text."""

    def size(content: bytes) -> int:
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(prefix + text.numpy().tobytes()) - size(prefix)) / len(text)


def bits_by_position(model: nn.Module, text: Tensor) -> tuple[Tensor, Tensor]:
    """Mean bits of a byte by the number of bytes before it in the window, in groups of eight.

    Returns:
        Mean position in the window and mean bits of each group.
    """
    costs = [bits(model, windows(text, length)[::4]).mean(0) for length in range(LATENTS, CONTEXT + 1, LATENTS)]
    return torch.arange(1, CONTEXT + 1).view(-1, 8).double().mean(1), torch.cat(costs).view(-1, 8).mean(1)


def sample_text(model: pc.PerceiverAR, text: Tensor, count: int) -> dict[str, str]:
    """Sample a continuation of a held-out program.

    Returns:
        The `prompt` and the `new` bytes, as text.
    """
    content = text.numpy().tobytes()
    end = max(content.find(PROMPT, CONTEXT), CONTEXT) + len(PROMPT)
    prompt = torch.tensor([list(content[end - CONTEXT : end])])
    sampler, generator = pc.models.sampling.Sample(temperature=0.6), torch.Generator().manual_seed(0)
    ids = pc.generate(model, prompt, max_new_tokens=count, sampler=sampler, use_cache=False, generator=generator)
    return {"prompt": printable(prompt[0]), "new": printable(ids[0])}


def printable(ids: Tensor) -> str:
    """Bytes as text; bytes that cannot be printed become replacement characters."""
    characters = map(chr, ids.tolist())
    return "".join(c if c == "\n" or " " <= c <= "~" else "\ufffd" for c in characters)


def draw(rows: Rows, positions: tuple[Tensor, Tensor], sample: dict[str, str]) -> Figure:
    """Plot bits per byte by method and by position, beside a sample."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    method_axes, position_axes = left.subplots(2, 1)
    bars = {name: row for name, row in rows.items() if " less " not in name}
    colors = ["tab:blue" if name.startswith("Perceiver") else "silver" for name in bars]
    method_axes.barh(list(bars), [row["mean"] for row in bars.values()], color=colors)
    for y, row in enumerate(bars.values()):
        method_axes.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1.5)
        method_axes.text(row["high"] + 0.1, y, f"{row['mean']:.2f}", va="center", fontsize=8)
    method_axes.set(xlabel="bits per byte", xlim=(0, 9))
    method_axes.invert_yaxis()
    position_axes.plot(*positions, color="tab:blue")
    position_axes.set(xlabel="bytes before it in the window", ylabel="bits per byte", ylim=(0, None))
    position_axes.grid(alpha=0.3)
    lines = sample["prompt"].split("\n")[-12:]
    wrapped = [
        part for line in sample["new"].split("\n") for part in (line[i : i + 74] for i in range(0, len(line), 74))
    ]
    style = {"family": "monospace", "fontsize": 8, "va": "top", "parse_math": False, "linespacing": 1.3}
    right.text(0.03, 0.96, "held-out program", fontsize=9, weight="bold", va="top")
    right.text(0.03, 0.92, "\n".join(line[:74] for line in lines), color="gray", **style)
    right.text(0.03, 0.53, "continuation by the model", fontsize=9, weight="bold", va="top")
    right.text(0.03, 0.49, "\n".join(wrapped[:16]), **style)
    return figure


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train the model, compare it with the baselines, and write result and figure."""
    run = Run("byte_language", __doc__, arguments)
    text = text_data.load(toy=run.toy)
    scored_windows = windows(text.test)
    model = run.train("Perceiver AR", build(), partial(loss, text=text.train), steps=3 if run.toy else STEPS, lr=3e-3)
    costs = {
        f"counts, order {order}": text_data.chunk_means(count_bits(text.train, scored_windows, order), LATENTS)
        for order in (3, 5)
    }
    costs["Perceiver AR"] = text_data.chunk_means(bits(model, scored_windows), LATENTS)
    start, num_scored = CONTEXT + 1 - LATENTS, len(costs["Perceiver AR"]) * text_data.CHUNK_BYTES
    first, scored = text.test[:start], text.test[start : start + num_scored]
    for name, prefix in {"lzma": first, "lzma, after the training text": torch.cat([text.train, first])}.items():
        costs[name] = torch.full((len(scored) // text_data.CHUNK_BYTES,), lzma_bits(scored, prefix.numpy().tobytes()))
    costs["uniform"] = torch.full_like(costs["lzma"], 8.0)
    rows = compare(costs, ours="Perceiver AR", best=min)
    print(markdown_table(rows, "bits per byte"))
    sample = sample_text(model, text.test, 40 if run.toy else 500)
    figure = draw(rows, bits_by_position(model, text.test), sample)
    data = {**text.sizes(), "scored": num_scored, "pieces": len(costs["lzma"])}
    return run.finish(figure, tables={"bits per byte": rows}, data=data, sample=sample)


if __name__ == "__main__":
    sys.exit(run_command(main))
