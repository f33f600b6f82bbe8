"""Configuration of Lightning's Trainer: options, callbacks and logger."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy

from examples.akoa.training.callbacks import Continuation, EpochPrinter, EventLog, History
from examples.akoa.training.laterality import AtomicCheckpointIO, weight_averaging

CHECKPOINTS, HISTORY = "checkpoints", "history.csv"


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run; see `--help` of `examples.akoa.train`."""

    data: Path
    labels: Path
    out: Path
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    label_smoothing: float
    seed: int
    size: tuple[int, int]
    patience: int
    limit_batches: int | None
    augment: bool
    fold: int | None
    folds: int | None
    devices: int
    accelerator: str
    precision: str
    resume: bool


def make_trainer(options: TrainingOptions, out: Path) -> Trainer:
    """Build a trainer that keeps the best and the last checkpoint, the history, and logs for TensorBoard."""
    num_ranks = int(os.environ.get("WORLD_SIZE", options.devices))
    interactive = sys.stderr.isatty()
    checkpoints = out / CHECKPOINTS
    keep = partial(ModelCheckpoint, checkpoints, enable_version_counter=False)
    callbacks: list[Callback] = [
        Continuation(checkpoints),
        History(out / HISTORY),
        weight_averaging(),
        EarlyStopping("val_loss", patience=options.patience),
        LearningRateMonitor("step"),
        keep(filename="best", monitor="val_loss"),
        keep(filename="last", save_on_train_epoch_end=True),
        TQDMProgressBar(refresh_rate=5) if interactive else EpochPrinter(),
    ]
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=max(1, num_ranks // options.devices),
        # Broadcasting the buffers of batch norm at every forward would block, since ranks validate unequal numbers
        # of batches.
        strategy=DDPStrategy(broadcast_buffers=False) if num_ranks > 1 else "auto",
        precision=options.precision,  # type: ignore[arg-type]
        max_epochs=options.epochs,
        limit_train_batches=options.limit_batches,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,  # KneeDataModule has its own, without repetition in validation
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=EventLog(out / "tensorboard"),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=interactive,
        enable_model_summary=False,
    )


def silence_warnings() -> None:
    """Silence warnings that do not apply: a batch is one indexing operation, which workers would slow down."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*broadcast_buffers.*", FutureWarning
    )  # its successor is not in older versions of PyTorch
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # between Lightning and PyTorch
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")
