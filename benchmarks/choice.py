"""Whether reads choose well: what each path was predicted to take, what it takes, and which is chosen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import perceiver_core as pc
from benchmarks import failures, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Work, compete
from benchmarks.read import State, forward, library
from perceiver_core import reads


class Case(NamedTuple):
    """A read of a grid."""

    grid: tuple[int, ...]
    channels: int
    latents: int
    heads: int
    head: int  # the width of one
    bands: int = 16
    batch: int = 1
    dtype: str = "float32"


KEPT = ("candidate", "median ms", "spread %", "peak MB", "note")
TOY = (Case(grid=(7, 11), channels=3, latents=16, heads=1, head=8),)
FULL = (
    Case(grid=(8, 12), channels=3, latents=32, heads=1, head=32),
    Case(grid=(32, 32), channels=3, latents=64, heads=1, head=64),
    Case(grid=(64, 96), channels=1, latents=32, heads=1, head=32),
    Case(grid=(128, 128), channels=3, latents=256, heads=1, head=64),
    Case(grid=(128, 128), channels=3, latents=256, heads=8, head=16),
    Case(grid=(128, 128), channels=3, latents=256, heads=8, head=64),
    Case(grid=(128, 128), channels=3, latents=256, heads=1, head=64, dtype="bfloat16"),
    Case(grid=(56, 56), channels=64, latents=512, heads=1, head=322),
    Case(grid=(56, 56), channels=64, latents=512, heads=8, head=32),
    Case(grid=(28, 28), channels=48, latents=256, heads=1, head=64, batch=8),
    Case(grid=(14, 14), channels=768, latents=256, heads=8, head=64, batch=8),
    Case(grid=(4096,), channels=16, latents=256, heads=1, head=64),
    Case(grid=(16, 56, 56), channels=3, latents=256, heads=1, head=64),
    Case(grid=(2, 8192), channels=3, latents=128, heads=1, head=64),
)


def run(setting: Setting) -> Results:
    """Every path that can read a case, at every case."""
    rows: list[Row] = []
    lost = []
    for case in TOY if setting.toy else FULL:
        read, x, tokens = _state(case, setting.device)
        request = read.request(tokens, queries=x.shape[1])
        chosen = reads.Auto().choose(request)
        measured = {row["candidate"]: row for row in compete(_contest(case), setting)}
        for path in reads.Auto().strategies:
            row = measured[type(path).__name__]
            predicted = 1000 * path.cost(request, reads.Machine()).seconds / torch.get_num_threads()
            kept = {name: row[name] for name in KEPT if name in row}
            rows.append({**_sizes(case), **kept, "predicted ms": predicted, "chosen": path == chosen})
        times = {row["candidate"]: row["median ms"] for row in failures.measured(list(measured.values()))}
        if (name := type(chosen).__name__) in times:
            lost.append(times[name] / min(times.values()))
    return Results(rows, [_loss(lost)] if lost else [])


def _loss(lost: list[float]) -> str:
    worst, mean = max(lost), sum(lost) / len(lost)
    return f"what was chosen took {mean:.2f} times the fastest path's time on average, at worst {worst:.2f}"


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    told = ("predicted ms", "chosen")
    shown = [{name: value for name, value in row.items() if name not in told} for row in rows]
    plots.bars(shown, path, title="Reads by each path")


def _sizes(case: Case) -> Row:
    return {**case._asdict(), "grid": " x ".join(map(str, case.grid))}


def _contest(case: Case) -> Contest:
    ways = {type(path).__name__: partial(library, path) for path in reads.Auto().strategies}
    return Contest(
        sizes=_sizes(case),
        setup=partial(_state, case),
        candidates={name: Candidate(partial(forward, way), case.dtype) for name, way in ways.items()},
        work=lambda _: Work(flops=0.0),
    )


def _state(case: Case, device: str) -> State:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    where = pc.positions.Fourier(num_axes=len(case.grid), num_bands=case.bands, max_resolution=max(case.grid))
    attention = partial(pc.MultiHeadAttention, qk_dim=case.heads * case.head)
    read = pc.CrossAttend(512, case.channels + where.dim, num_heads=case.heads, attention=attention).to(device, dtype)
    content = torch.randn(case.batch, *case.grid, case.channels, device=device, dtype=dtype)
    latents = torch.randn(1, case.latents, 512, device=device, dtype=dtype)
    return read, latents, pc.Tokens(content, where.tables(case.grid, like=content))
