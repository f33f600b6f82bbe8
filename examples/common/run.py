"""Command-line options, training and result files of the short examples."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.common import parse
from examples.common.command import ArgumentParser
from examples.common.output_folder import output_folder
from examples.common.scores import Rows
from examples.common.terminal import printable
from perceiver_core.atomic_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""Content of a result.json."""


class Run:
    """One run of an example: its options, its start time and its trained models.

    The folder of the results is created and locked, so that a folder that cannot be used is reported before the run.

    Args:
        name: Name of the module in `examples`.
        description: Text of `--help`; the docstring of the module.
        arguments: Command-line arguments; None takes those of the process.
        options: Settings of further options for `add_argument`, by name, such as `{"--data": {"type": Path}}`.

    Raises:
        OSError: The folder cannot be created or written to.
        ValueError: Another command works in the folder.
    """

    def __init__(
        self,
        name: str,
        description: str | None,
        arguments: Sequence[str] | None,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--seed", type=parse.seed, default=0, help="seed of weights and training; data has its own seeds"
        )
        parser.add_argument("--toy", action="store_true", help="train for a few steps only, to check that it runs")
        parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of result and figure")
        for option, settings in (options or {}).items():
            parser.add_argument(option, **settings)
        self.options = given = parser.parse_args(arguments)
        self.name, self.seed, self.toy, self.out = name, given.seed, given.toy, given.out
        values = {option: getattr(given, option.strip("-")) for option in options or {}}
        changed = {x: value for x, value in values.items() if value not in (parser.get_default(x.strip("-")), True)}
        flags = [part for option in changed.items() for part in map(str, option)]  # without switches such as --resume
        flags += [*(["--seed", str(self.seed)] if self.seed else []), *(["--toy"] if self.toy else [])]
        self.command = shlex.join(["python", "-m", f"examples.{name}", *flags, "--out", self.out.as_posix()])
        self._folder = ExitStack()  # locked until `finish`, or the end of the process
        self._folder.enter_context(output_folder(self.out))
        self.start, self.trained = time.perf_counter(), {}
        torch.manual_seed(self.seed)

    def train(
        self,
        name: str,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        *,
        steps: int,
        lr: float = 1e-3,
        decay: float = 0.995,
    ) -> nn.Module:
        """Train with AdamW and a one-cycle schedule, and return a running average of the weights.

        Args:
            name: Name of the model in progress lines and in the result.
            model: Model to train in place.
            loss: Function that draws a batch and returns the loss of a model on it.
            steps: Number of optimizer steps.
            lr: Highest learning rate.
            decay: Decay of the exponential moving average of the weights.

        Returns:
            A copy of the model with the averaged weights, in evaluation mode.
        """
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
        start, recent = time.perf_counter(), []
        for step in range(1, steps + 1):
            value = loss(model)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            recent.append(value.item())
            if step % max(1, steps // 20) == 0:
                elapsed, mean = time.perf_counter() - start, sum(recent) / len(recent)
                print(f"{name}: step {step} of {steps}, loss {mean:.4f}, {elapsed:.0f} s", flush=True)
                recent = []
        seconds, size = time.perf_counter() - start, sum(p.numel() for p in model.parameters())
        self.trained[name] = {"steps": steps, "of": steps, "seconds": round(seconds, 1), "parameters": size}
        return average.module.eval()

    def finish(self, figure: Figure, *, tables: Mapping[str, Rows], **extra: object) -> Result:
        """Write `result.json` and `figure.png`.

        Args:
            figure: Figure to save.
            tables: Rows of scores, by the title of their table.
            **extra: Further entries of the result.

        Returns:
            Content of `result.json`.
        """
        result = {
            "command": self.command,
            "machine": machine(),
            "seconds": round(time.perf_counter() - self.start, 1),
            "seed": self.seed,
            "toy": self.toy,
            "trained": self.trained,
            **extra,
            "tables": tables,
        }
        write_atomically(
            {
                self.out / "figure.png": lambda path: figure.savefig(path, dpi=110, format="png"),
                self.out / "result.json": json.dumps(result, indent=2) + "\n",
            }
        )
        self._folder.close()
        print(f"result and figure: {printable(self.out)}")
        return result


def machine() -> dict[str, str | int]:
    """Hardware and software versions that affect run times."""
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
