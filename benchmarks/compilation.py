"""Cost and gain of compilation: the first step of a small Perceiver and the steps after it.

Cold means that nothing was compiled before; warm that another process has compiled the same and its cache is present.
Each start is a process of its own, in which the library has been imported and nothing has run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import perceiver_core as pc
from benchmarks import measurement, models, report
from benchmarks.comparison import TOLERANCES, Row, Setting, Tensors, check_agreement
from perceiver_core import reads

TITLE = "Compiling a small Perceiver"
STARTS = ("keys and values", "structured reads", "structured reads, torch.compile")  # nothing is compiled for the first
START_SECONDS = 90.0  # that one process may take


class Start(NamedTuple):
    """Measurements in a fresh process."""

    first: float  # seconds
    later: measurement.Timing
    result: list[float]


def prepared(name: str, model: nn.Module, folder: Path) -> nn.Module:
    """Return the model of a start; a folder keeps the loop of structured reads and graphs of torch.compile."""
    os.environ |= {"XDG_CACHE_HOME": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch")}
    without = reads.Auto(strategies=[reads.Factored(), reads.Dense()])
    reads.set_strategy(model, without if name == STARTS[0] else reads.Structured())
    return torch.compile(model) if "torch.compile" in name else model  # type: ignore[return-value]


def run(setting: Setting) -> Iterator[Row]:
    """Measure each start cold, and warm where something is cached; forward, and forward with backward."""
    for direction in ("forward",) if setting.toy else ("forward", "with backward"):
        baseline = None
        for name in STARTS if setting.only in f"direction {direction}" else ():
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("",) if name == STARTS[0] else (", cold", ", warm"):
                    row: Row = {"direction": direction, "candidate": name + cache}
                    try:
                        seconds = min(START_SECONDS, setting.remaining)
                        start = measurement.in_process(_start, name, direction, Path(folder), setting, seconds=seconds)
                        baseline = baseline or start
                        pair = (torch.tensor(start.result),), "the first", (torch.tensor(baseline.result),)
                        check_agreement(name, *pair, TOLERANCES["float32"])
                    except TimeoutError as error:
                        yield row | {"note": report.LEFT_OUT + str(error)}
                    except Exception as error:
                        yield row | {"note": report.FAILED + report.describe_error(error)}
                    else:
                        row |= {"first ms": 1000 * start.first, "median ms": 1000 * start.later.median}
                        row |= {"spread %": 100 * start.later.spread}
                        yield row | {"ratio": baseline.later.median / start.later.median}


def model(*, toy: bool) -> tuple[nn.Module, Tensor]:
    """Make a small Perceiver and images."""
    torch.manual_seed(0)
    small = partial(pc.Encoder, num_latents=8, dim=32, num_reads=1, depth=0, num_heads=4)
    encoder = small if toy else partial(pc.Encoder, num_latents=128, dim=256, num_reads=2, depth=1, num_heads=4)
    return models.perceiver(encoder, bands=4 if toy else 32), torch.randn(2, 3, *((20, 20) if toy else (64, 64)))


def _start(name: str, direction: str, folder: Path, setting: Setting) -> Start:
    """Measure the first step and later ones, in this process."""
    eager, images = (each.to(setting.device) for each in model(toy=setting.toy))
    began = time.perf_counter()
    step = partial(_forward if direction == "forward" else _backward, prepared(name, eager, folder), images)
    measurement.once(step, setting.device)
    first, rounds = time.perf_counter() - began, 3 if setting.toy else 30
    later = measurement.interleaved({name: step}, device=setting.device, rounds=rounds, seconds=5.0)[name]
    return Start(first, later, torch.cat([tensor.flatten().cpu() for tensor in step()]).tolist())


@torch.no_grad()
def _forward(ready: nn.Module, images: Tensor) -> Tensors:
    return (ready(images),)


def _backward(ready: nn.Module, images: Tensor) -> Tensors:
    out = ready(images)
    gradients = torch.autograd.grad(out.square().mean(), list(ready.parameters()))
    return out.detach(), torch.nn.utils.get_total_norm(gradients)[None]


plot = partial(report.bars, title=TITLE, measures={"first ms": "first step, ms", "median ms": "later steps, median ms"})
