"""Growth of the time and memory of a read with its tokens and with its latents, and the exponents of that growth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks import report
from benchmarks.comparison import Row, Setting, compare_all
from benchmarks.read import METHODS, Sizes, comparison

TITLE = "One read as its tokens or its latents grow"
MOST_BYTES = 6e9  # that a candidate may need
MOST_SECONDS = 4.0  # that one call of a candidate may take
CANDIDATES = {name: METHODS["cpu"][name] for name in ("einsum", "sdpa", "factored", "library")}
BASE = Sizes(num_latents=256, dim=256, grid=(224, 224), num_bands=16, num_heads=1, head_dim=64)
TOY = Sizes(num_latents=16, dim=32, grid=(20, 20), num_bands=4, num_heads=1, head_dim=8)
IMAGES = ((25, 40), (50, 60), (100, 100), (150, 200), (250, 400), (500, 600), (1000, 1000), (1500, 2000), (2500, 4000))
AUDIO = ((1000,), (3000,), (10_000,), (30_000,), (100_000,), (300_000,), (1_000_000,))
LATENTS = (32, 64, 128, 256, 512, 1024, 2048)
TOY_LATENTS = (8, 32)
MEASURES = {"time": "median ms", "memory": "peak MB"}
KEPT = ("candidate", "median ms", "spread %", "GFLOP/s", "peak MB", "note")


class Sweep(NamedTuple):
    """Reads that differ in one size, in ascending order."""

    along: str
    direction: str
    reads: dict[int, Sizes]


def run(setting: Setting) -> Iterator[Row | str]:
    """Measure all sweeps."""
    for sweep in sweeps(toy=setting.toy):
        rows = []
        for found in _measured(sweep, setting):
            yield found
            rows += [found] if isinstance(found, dict) else []
        yield from _fits(sweep, report.measured(rows))


def sweeps(*, toy: bool) -> tuple[Sweep, ...]:
    """Return sweeps over the tokens of images and of audio, and over the latents."""
    base, counts = (TOY, TOY_LATENTS) if toy else (BASE, LATENTS)
    grids = (IMAGES[:3], AUDIO[:2]) if toy else (IMAGES, AUDIO)
    images, audio = ({math.prod(grid): base._replace(grid=grid) for grid in these} for these in grids)
    return (
        Sweep("tokens", "forward", images),
        Sweep("tokens, with backward", "with backward", images),
        Sweep("tokens of audio", "forward", audio),
        Sweep("latents", "forward", {count: base._replace(num_latents=count) for count in counts}),
    )


def _measured(sweep: Sweep, setting: Setting) -> Iterator[Row | str]:
    """Yield the rows of a sweep; a candidate ends before it would, in proportion, need too much memory or time."""
    per_size = dict.fromkeys(CANDIDATES, (0.0, 0.0))  # bytes and seconds
    for size, read in sweep.reads.items():
        methods = dict(CANDIDATES)
        for name, (memory, seconds) in per_size.items():
            if memory * size > MOST_BYTES or seconds * size > MOST_SECONDS:
                del methods[name]
                if math.isfinite(memory):  # otherwise the row at the size before has a note
                    needed = f"{memory * size / 1e9:.1f} GB and {seconds * size:.1f} s"
                    yield f"{sweep.along}: {name}, left out at {size:,}, where it would need {needed}"
        for row in compare_all([comparison(read, sweep.direction, methods)] if methods else [], setting):
            missing = math.inf if "note" in row else 0.0
            memory, milliseconds = row.get("peak MB", missing), row.get("median ms", missing)
            if row["candidate"] in per_size:
                per_size[row["candidate"]] = memory * 1e6 / size, milliseconds / 1e3 / size
            yield {"along": sweep.along, "size": size, **{name: row[name] for name in KEPT if name in row}}


def _fits(sweep: Sweep, rows: Sequence[Row]) -> Iterator[str]:
    """Yield notes on how the time and memory of each candidate grow."""
    for name in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == name]
        sizes = [row["size"] for row in own]
        powers = {measure: exponent(sizes, [row[column] for row in own])[0] for measure, column in MEASURES.items()}
        growth = ", ".join(f"{measure} grows as n^{power:.2f}" for measure, power in powers.items())
        yield f"{sweep.along}: {name}, {growth}"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit log y = log c + p log x by least squares to the larger half of the sizes; return p and c.

    Among the smaller sizes fixed costs hide the growth. NaN if fewer than two values are positive.
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y > 0]
    points = points[-max(2, -(-len(points) // 2)) :]
    if len(points) < 2:
        return math.nan, math.nan
    middle, height = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    power = sum((x - middle) * (y - height) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
    return power, math.exp(height - power * middle)


plot = partial(report.curves, measures=MEASURES, fit=exponent, title=TITLE)
