"""How the time and memory of a read grow with its tokens and with its latents, and the exponents of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import failures, plots
from benchmarks.contest import Results, Row, Setting, compete
from benchmarks.read import READS, Read, contest

MOST = 6e9  # bytes that a candidate may need
BASE = Read(latents=256, dim=256, grid=(224, 224), bands=16, heads=1, head=64)
TOY = Read(latents=16, dim=32, grid=(20, 20), bands=4, heads=1, head=8)
GRIDS = ((25, 40), (50, 60), (100, 100), (150, 200), (250, 400), (500, 600), (1000, 1000), (1500, 2000), (2500, 4000))
TOY_GRIDS = ((25, 40), (50, 60), (100, 100))
SOUNDS = ((1000,), (3000,), (10_000,), (30_000,), (100_000,), (300_000,), (1_000_000,))
TOY_SOUNDS = ((1000,), (3000,))
LATENTS = (32, 64, 128, 256, 512, 1024, 2048)
TOY_LATENTS = (8, 32)
MEASURES = {"time": "median ms", "memory": "peak MB"}


class Sweep(NamedTuple):
    """Reads that differ in one size, small ones first."""

    along: str
    direction: str
    sizes: tuple[int, ...]
    reads: tuple[Read, ...]


def run(setting: Setting) -> Results:
    """All sweeps."""
    rows: list[Row] = []
    notes: list[str] = []
    for sweep in sweeps(toy=setting.toy):
        found, left_out = _measured(sweep, setting)
        rows += found
        notes += left_out + [f"{sweep.along}: {name}, {text}" for name, text in _fits(found).items()]
    return Results(rows, notes)


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory against the sizes, with the fitted lines."""
    plots.curves(rows, path, measures=MEASURES, fit=exponent, title="One read as its tokens or its latents grow")


def sweeps(*, toy: bool) -> tuple[Sweep, ...]:
    """Tokens at one number of latents, of pictures and of sounds; latents at one number of tokens."""
    base, latents = (TOY, TOY_LATENTS) if toy else (BASE, LATENTS)
    pictures, sounds = (TOY_GRIDS, TOY_SOUNDS) if toy else (GRIDS, SOUNDS)

    def growing(along: str, direction: str, grids: tuple[tuple[int, ...], ...]) -> Sweep:
        return Sweep(along, direction, tuple(map(math.prod, grids)), tuple(base._replace(grid=grid) for grid in grids))

    return (
        growing("tokens", "forward", pictures),
        growing("tokens, with backward", "with backward", pictures),
        growing("tokens of a sound", "forward", sounds),
        Sweep("latents", "forward", latents, tuple(base._replace(latents=m) for m in latents)),
    )


def _measured(sweep: Sweep, setting: Setting) -> tuple[list[Row], list[str]]:
    """Rows of a sweep; a candidate stops where it would need too much memory, in proportion to the size before."""
    rows: list[Row] = []
    notes = []
    needed = dict.fromkeys(READS, 0.0)  # bytes for each unit of size
    for size, read in zip(sweep.sizes, sweep.reads, strict=True):
        ways = {name: way for name, way in READS.items() if needed[name] * size <= MOST}
        notes += [
            f"{sweep.along}: {name}, left out at {size:,}, where it would need {needed[name] * size / 1e9:.1f} GB"
            for name in READS
            if name not in ways
        ]
        if not ways:
            continue
        for row in compete(contest(read, sweep.direction, ways), setting):
            needed[row["candidate"]] = row.get("peak MB", math.inf) * 1e6 / size
            kept = ("candidate", "median ms", "spread %", "GFLOP/s", "peak MB", "note")
            rows.append({"along": sweep.along, "size": size, **{name: row[name] for name in kept if name in row}})
    return rows, notes


def _fits(rows: Sequence[Row]) -> dict[str, str]:
    """For each candidate, how its time and memory grow."""
    texts, rows = {}, failures.measured(rows)
    for name in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == name]
        sizes = [row["size"] for row in own]
        powers = {measure: exponent(sizes, [row[column] for row in own]) for measure, column in MEASURES.items()}
        texts[name] = ", ".join(f"{measure} grows as n^{power:.2f}" for measure, (power, _) in powers.items())
    return texts


def exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The power p and the factor c of the least-squares line log y = log c + p log x, by the larger half of the sizes.

    Among the smaller ones fixed costs hide what grows. NaN where fewer than two values are positive.
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y > 0]
    points = points[-max(2, -(-len(points) // 2)) :]
    if len(points) < 2:
        return math.nan, math.nan
    middle, height = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    power = sum((x - middle) * (y - height) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
    return power, math.exp(height - power * middle)
