"""What the short examples share: options, training, intervals, and files that are written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Rows = Mapping[str, Mapping[str, float]]  # name: mean, low and high


class Run:
    """One run of an example: its options, when it started, and what it leaves behind.

    Args:
        name: the module's name in `examples`.
        about: its docstring, shown by `--help`.
        arguments: the command line; that of the process unless given.
    """

    def __init__(self, name: str, about: str | None, arguments: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seed", type=int, default=0, help="of the weights and of training; data has its own")
        parser.add_argument("--toy", action="store_true", help="a few steps, to see that it runs")
        parser.add_argument("--out", type=Path, default=Path("runs") / name, help="where result and picture go")
        options = parser.parse_args(arguments)
        self.name, self.seed, self.toy, self.out = name, options.seed, options.toy, options.out
        given = [*(["--seed", str(self.seed)] if self.seed else []), *(["--toy"] if self.toy else [])]
        self.command = shlex.join(["python", "-m", f"examples.{name}", *given, "--out", self.out.as_posix()])
        self.start, self.trained = time.perf_counter(), {}
        torch.manual_seed(self.seed)

    def train(
        self,
        what: str,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        *,
        steps: int,
        lr: float = 1e-3,
        decay: float = 0.995,
    ) -> nn.Module:
        """The model with a running average of its weights in training. Control-C ends training, not the run."""
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
        start, done, recent = time.perf_counter(), 0, []
        try:
            for step in range(1, steps + 1):
                value = loss(model)
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                average.update_parameters(model)
                done = step
                recent.append(value.item())
                if step % max(1, steps // 20) == 0:
                    spent, mean = time.perf_counter() - start, sum(recent) / len(recent)
                    print(f"{what}: step {step} of {steps}, loss {mean:.4f}, {spent:.0f} s", flush=True)
                    recent = []
        except KeyboardInterrupt:
            print(f"{what}: stopped after step {done} of {steps}")
        seconds, size = time.perf_counter() - start, sum(p.numel() for p in model.parameters())
        self.trained[what] = {"steps": done, "of": steps, "seconds": round(seconds, 1), "parameters": size}
        return average.module.eval()

    def finish(self, figure: Any, *, tables: Mapping[str, Rows], **found: Any) -> dict[str, Any]:
        """Writes `result.json` and `picture.png`; what it wrote in the first."""
        result = {
            "command": self.command,
            "machine": machine(),
            "seconds": round(time.perf_counter() - self.start, 1),
            "seed": self.seed,
            "toy": self.toy,
            "trained": self.trained,
            **found,
            "tables": tables,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        write(self.out / "picture.png", lambda path: figure.savefig(path, dpi=110, format="png"))
        write(self.out / "result.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
        print(f"result and picture: {self.out}")
        return result


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Whole or not at all: written beside its place, then moved there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def machine() -> dict[str, Any]:
    """What a time depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def interval(values: Tensor, *, resamples: int = 2000) -> dict[str, float]:
    """The mean of values, and where 95 % of the means of bootstrap samples lie."""
    values = values.double()
    picks = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def compare(scores: Mapping[str, Tensor], *, ours: str, best: Callable[..., str] = max) -> dict[str, dict[str, float]]:
    """An interval for each row of scores `n`, and, sample by sample, for ours less the best of the others.

    Which is the best, `max` says or, where less is better, `min`. Rows named "Perceiver ..." are no others.
    """
    rows = {name: interval(row) for name, row in scores.items()}
    other = best((name for name in scores if not name.startswith("Perceiver")), key=lambda name: rows[name]["mean"])
    return {**rows, f"{ours} less {other}": interval(scores[ours] - scores[other])}


def said(x: float) -> str:
    """A number to two digits, without a minus before zero."""
    return f"{round(x, 2) + 0.0:.2f}"


def table(rows: Rows, unit: str) -> str:
    """Rows as a Markdown table."""
    cells = [(name, said(row["mean"]), f"{said(row['low'])} to {said(row['high'])}") for name, row in rows.items()]
    cells = [("", unit, "95 % interval"), *cells]
    wide = [max(len(line[column]) for line in cells) for column in range(3)]
    lines = [f"| {name:<{wide[0]}} | {mean:>{wide[1]}} | {span:>{wide[2]}} |" for name, mean, span in cells]
    lines.insert(1, f"|{'-' * (wide[0] + 2)}|{'-' * (wide[1] + 1)}:|{'-' * (wide[2] + 1)}:|")
    return "\n".join(lines)
