"""Ways to run the loop of a structured read on the CPU: C++, torch.compile, numba, eager; forward only.

Why the library compiles C++. numba takes part where it is installed (`pip install numba`).
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks import plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete_all
from perceiver_core.kernels.grid import eager, read_grid

State: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # what `read_grid` takes
LOG2E = 1.4426950408889634
CHUNK = 16  # queries that the compiled graph takes at once


def run(setting: Setting) -> Results:
    """Every route that is there."""
    latents, height, width = (16, 19, 23) if setting.toy else (512, 224, 224)
    ways = {"eager": Candidate(in_pieces), "torch.compile": Candidate(by_torch_compile), "C++": Candidate(by_cpp)}
    notes = []
    if importlib.util.find_spec("numba"):
        ways["numba"] = Candidate(by_numba)
    else:
        notes.append("numba: left out, it is not installed")
    contest = Contest(
        sizes={"latents": latents, "height": height, "width": width, "channels": 3},
        setup=partial(_state, latents, height, width),
        candidates=ways,
        work=lambda _: Work(flops=0.0, exps=latents * height * width),
    )
    return Results(compete_all([contest], setting), notes)


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="The loop of a structured read, forward")


@torch.no_grad()
def by_cpp(given: State) -> Tensors:
    """As the library does."""
    return tuple(read_grid(*given))


@torch.no_grad()
def in_pieces(given: State) -> Tensors:
    """As the library does without a compiler."""
    read, marginals, base, total = eager.forward(*given, None)
    return read, marginals, (base + total.log2()) / LOG2E


@torch.no_grad()
def by_torch_compile(given: State) -> Tensors:
    """A compiled graph for a few queries at a time, whose scores stay in the cache."""
    a, u, content, scale = given
    height = scale.shape[1]
    chunks = zip(a[0, 0].split(CHUNK), u[0, 0].split(CHUNK), strict=True)
    parts = [_compiled()(q, t[:, :height], t[:, height:], content[0], scale[0]) for q, t in chunks]
    return tuple(torch.cat(part)[None, None] for part in zip(*parts, strict=True))


@cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(_few_queries)


def _few_queries(a: Tensor, rows: Tensor, columns: Tensor, content: Tensor, scale: Tensor) -> Tensors:
    products = [a[:, k, None, None] * content[k] for k in range(content.shape[0])]
    scores = (sum(products[1:], products[0]) + rows[:, :, None] + columns[:, None, :]) * scale
    top = scores.amax((1, 2), keepdim=True)
    p = (scores - top).exp()
    total = p.sum((1, 2))[:, None]
    p = p * scale
    read = p.flatten(1) @ content.flatten(1).T
    marginals = torch.cat([p.sum(2), p.sum(1)], dim=1)
    return read / total, marginals / total, (top.flatten(1) + total.log()).squeeze(1)


def by_numba(given: State) -> Tensors:
    """The same loop in Python that numba compiles."""
    from benchmarks import numba_route

    return numba_route.read_grid(*given)


def _state(latents: int, height: int, width: int, device: str) -> State:
    torch.manual_seed(0)
    a, u = torch.randn(1, 1, latents, 3), torch.randn(1, 1, latents, height + width)
    content, scale = torch.randn(1, 3, height, width), torch.rand(1, height, width) + 0.5
    return a.to(device), u.to(device), content.to(device), scale.to(device)
