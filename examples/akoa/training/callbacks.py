"""Callbacks and logger of a training, with which a resumed training gives the same results as an uninterrupted one."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from examples.common import command
from perceiver_core.atomic_files import write_atomically

_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


class History(Callback):
    """Callback that writes the metrics of each epoch to a CSV file, and stores them in every checkpoint.

    A checkpoint contains the metrics of all epochs up to its own, so that a training that is killed and resumed has the
    same history as an uninterrupted one.

    Args:
        path: Path of the CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the metrics of the epoch, and write the file."""
        metrics = {name: float(trainer.callback_metrics[name]) for name in _METRICS}  # on all ranks, which reduce them
        self.epochs.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics})
        self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file again: it may be older than the checkpoint from which the training continued."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics, for the checkpoint."""
        return {"epochs": [dict(epoch) for epoch in self.epochs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of a checkpoint."""
        self.epochs = [dict(epoch) for epoch in state_dict["epochs"]]

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self.epochs:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, ("epoch", "step", *_METRICS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.epochs)
        write_atomically({self.path: text.getvalue()})


class Continuation(Callback):
    """Callback that restores state that Lightning does not: early stopping, and paths in a run folder that has moved.

    It also reinstalls the command's signal handlers, which Lightning replaces by handlers that exit with code 0.

    Args:
        checkpoints: Folder of the checkpoints.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Update the paths of checkpoints. Otherwise, Lightning would discard the best loss so far."""
        folder = Path(os.path.realpath(self.checkpoints))

        def moved(path: str) -> str:
            return str(folder / Path(path).name) if path else path

        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                state["dirpath"] = str(folder)
                state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
                for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[name] = moved(state[name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the first step if early stopping had already ended the training."""
        command.handle_signals()
        stopping = trainer.early_stopping_callback
        if stopping is not None and (stopping.wait_count >= stopping.patience or stopping.stopped_epoch):
            trainer.should_stop = True


class EpochPrinter(Callback):
    """Callback that prints a line per epoch, in place of a progress bar."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the logged metrics."""
        metrics = trainer.callback_metrics
        names = ("train_loss", "val_loss", "val_accuracy")
        values = ", ".join(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics)
        print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {values}", flush=True)


class EventLog(Logger):
    """Logger that appends metrics to an event file of TensorBoard.

    The log is the only file that is appended to. If it cannot be written, for example because the disk is full, a
    warning is printed and the training continues, since results depend on checkpoints only. (Lightning's own logger
    writes in a thread. It raises errors of the file later, when the next metric is logged.)

    Args:
        folder: Folder of the file, created with the first metrics.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._failed = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "tensorboard"

    @property
    def version(self) -> str:
        """Name of the file."""
        return self._path.name

    @rank_zero_only
    def log_hyperparams(self, params: object, *args: object, **kwargs: object) -> None:
        """Do nothing: the options of a run are in run.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append metrics to the file."""
        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in metrics.items()]
        event = Event(wall_time=time.time(), step=step or 0, summary=Summary(value=values))
        try:
            if not self._failed:
                self._append(event)
        except OSError as error:
            self._failed = True
            text = f"warning: no more logs for TensorBoard: {command.describe(error)}; the training continues"
            command.say(text)

    def _append(self, event: Event) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            if not file.tell():
                writer.write(Event(wall_time=event.wall_time, file_version="brain.Event:2").SerializeToString())
            writer.write(event.SerializeToString())
