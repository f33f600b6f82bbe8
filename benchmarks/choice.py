"""Quality of the automatic choice of a read's strategy: predicted and measured time of each, and which is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import report
from benchmarks.comparison import Row, Setting, compare_all
from benchmarks.read import Sizes, comparison, library, setup
from perceiver_core import reads

TITLE = "Reads by each strategy"
STRATEGIES = {type(each).__name__: each for each in (reads.Dense(), reads.Factored(), reads.Structured())}
METHODS = {name: partial(library, strategy) for name, strategy in STRATEGIES.items()}
KEPT = ("candidate", "median ms", "spread %", "peak MB", "note")


def _sizes(num_latents: int, grid: tuple[int, ...], num_heads: int, head_dim: int, **more: Any) -> Sizes:
    return Sizes(num_latents, 512, grid, num_heads, head_dim, num_bands=16, **more)


TOY = (_sizes(16, (7, 11), 1, 8),)
FULL = (
    _sizes(32, (8, 12), 1, 32),
    _sizes(64, (32, 32), 1, 64),
    _sizes(32, (64, 96), 1, 32, num_channels=1),
    _sizes(256, (128, 128), 1, 64),
    _sizes(256, (128, 128), 8, 16),
    _sizes(256, (128, 128), 8, 64),
    _sizes(256, (128, 128), 1, 64, dtype="bfloat16"),
    _sizes(512, (56, 56), 1, 322, num_channels=64),
    _sizes(512, (56, 56), 8, 32, num_channels=64),
    _sizes(256, (28, 28), 1, 64, num_channels=48, batch=8),
    _sizes(256, (14, 14), 8, 64, num_channels=768, batch=8),
    _sizes(256, (4096,), 1, 64, num_channels=16),
    _sizes(256, (16, 56, 56), 1, 64),
    _sizes(128, (2, 8192), 1, 64),
)


def run(setting: Setting) -> Iterator[Row | str]:
    """Measure every strategy at every size, and the loss by the choice."""
    losses = []
    for sizes in TOY if setting.toy else FULL:
        block, x, tokens = setup(sizes, setting.device)
        context = block.read_context(tokens, num_queries=x.shape[1])
        chosen = type(reads.Auto().choose(context).strategy).__name__
        rows = list(compare_all([comparison(sizes, "forward", METHODS)], setting))
        for row in rows:
            kept = {name: row[name] for name in KEPT if name in row}
            if strategy := STRATEGIES.get(row["candidate"]):
                predicted = strategy.cost(reads.Sizes.of(context), reads.Machine()).seconds / torch.get_num_threads()
                kept |= {"predicted ms": 1000 * predicted, "chosen": row["candidate"] == chosen}
            yield {**sizes.columns(), **kept}
        times = {row["candidate"]: row["median ms"] for row in report.measured(rows)}
        if chosen in times:
            losses.append(times[chosen] / min(times.values()))
    if losses:
        worst = f"on average, at worst {max(losses):.2f}"
        yield f"the chosen strategy took {sum(losses) / len(losses):.2f} times the time of the fastest {worst}"
