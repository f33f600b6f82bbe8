"""What compiling costs and gains: the first step of a small Perceiver and the steps after it.

Cold: nothing was compiled before. Warm: another process has compiled the same, and its cache is there. Each start
is a process of its own, in which the library has been imported and nothing has run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import perceiver_core as pc
from benchmarks import child, plots, timing
from benchmarks.contest import TOLERANCES, Results, Row, Setting, agree
from perceiver_core import reads


class Start(NamedTuple):
    """What a fresh process found."""

    first: float  # seconds
    steady: timing.Timing
    numbers: list[float]  # what it computed


def ordinary(model: nn.Module, folder: Path) -> nn.Module:
    """The model with reads that form keys and values: nothing is compiled."""
    reads.set_strategy(model, reads.Auto(strategies=[reads.Factored(), reads.Dense()]))
    return model


def structured(model: nn.Module, folder: Path) -> nn.Module:
    """The model with structured reads, whose loop is compiled, and kept in a folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    reads.set_strategy(model, reads.Structured())
    return model


def compiled(model: nn.Module, folder: Path) -> nn.Module:
    """The same, compiled by torch beside that."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")
    return torch.compile(structured(model, folder))  # type: ignore[return-value]


# Ways to start: each makes a model ready in a fresh process, and may keep in a folder what the next process needs.
STARTS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "ordinary reads": ordinary,
    "structured reads": structured,
    "structured reads, torch.compile": compiled,
}
CACHED = ("structured reads", "structured reads, torch.compile")  # those that keep something


def run(setting: Setting) -> Results:
    """Each way cold, those that keep something also warm; forward, and forward with backward."""
    rows: list[Row] = []
    for direction in ("forward",) if setting.toy else ("forward", "with backward"):
        found: dict[tuple[str, str], Start] = {}
        for name in STARTS:
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("cold", "warm") if name in CACHED else ("none",):
                    found[name, cache] = child.run(_start, name, direction, Path(folder), setting)
        calls = {" ".join(which): partial(_numbers, start) for which, start in found.items()}
        agree(calls, dict.fromkeys(calls, TOLERANCES["float32"]))
        plain = next(iter(found.values())).steady.median
        rows += [_row(direction, *which, start, plain) for which, start in found.items()]
    return Results(rows, [])


def plot(rows: list[Row], path: Path) -> None:
    """First and later steps as bars."""
    plots.bars(
        rows,
        path,
        title="Compiling a small Perceiver",
        measures={"first ms": "first step, ms", "median ms": "later steps, median ms"},
    )


def model(*, toy: bool) -> tuple[nn.Module, Tensor]:
    """A small Perceiver and pictures."""
    torch.manual_seed(0)
    bands, latents, dim, side = (4, 8, 32, 20) if toy else (32, 128, 256, 64)
    adapter = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=bands, max_resolution=side))
    encoder = pc.Encoder(adapter.dim, num_latents=latents, dim=dim, num_reads=1 if toy else 2, depth=0 if toy else 1, num_heads=4)
    pictures = torch.randn(2, 3, side, side)
    return pc.Perceiver(adapter, encoder, pc.heads.Classification(dim, num_classes=10)), pictures


def _start(name: str, direction: str, folder: Path, setting: Setting) -> Start:
    """The first step and later ones, in this process."""
    plain, pictures = model(toy=setting.toy)
    plain, pictures = plain.to(setting.device), pictures.to(setting.device)
    began = time.perf_counter()
    ready = STARTS[name](plain, folder)
    step = partial({"forward": _forward, "with backward": _backward}[direction], ready, pictures)
    timing.once(step, setting.device)
    first = time.perf_counter() - began
    times = timing.interleaved({name: step}, device=setting.device, rounds=3 if setting.toy else 30, seconds=5.0)
    return Start(first, times[name], torch.cat([tensor.flatten().cpu() for tensor in step()]).tolist())


@torch.no_grad()
def _forward(ready: nn.Module, pictures: Tensor) -> tuple[Tensor, ...]:
    return (ready(pictures),)


def _backward(ready: nn.Module, pictures: Tensor) -> tuple[Tensor, ...]:
    out = ready(pictures)
    gradients = torch.autograd.grad(out.square().mean(), list(ready.parameters()))
    return out.detach(), torch.nn.utils.get_total_norm(gradients)[None]


def _numbers(start: Start) -> tuple[Tensor, ...]:
    return (torch.tensor(start.numbers),)


def _row(direction: str, name: str, cache: str, start: Start, plain: float) -> Row:
    return {
        "direction": direction,
        "candidate": name if cache == "none" else f"{name}, {cache}",
        "first ms": 1000 * start.first,
        "median ms": 1000 * start.steady.median,
        "spread %": 100 * start.steady.spread,
        "ratio": plain / start.steady.median,
    }
