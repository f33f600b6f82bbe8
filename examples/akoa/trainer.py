"""How a run is driven and recorded: Lightning's Trainer, its callbacks and its logs."""

from __future__ import annotations

import csv
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from examples.akoa.laterality import Checkpoints, averaging


@dataclass(frozen=True)
class Options:
    """What was asked for; see `--help`."""

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


def make_trainer(options: Options, out: Path) -> Trainer:
    """A trainer that keeps the best and the last checkpoint, and logs as CSV and for TensorBoard."""
    ranks = int(os.environ.get("WORLD_SIZE", options.devices))
    shown = sys.stderr.isatty()
    keep = partial(ModelCheckpoint, out / "checkpoints", enable_version_counter=False)
    callbacks: list[Callback] = [
        averaging(),
        EarlyStopping("val_loss", patience=options.patience),
        LearningRateMonitor("step"),
        keep(filename="best", monitor="val_loss"),
        keep(filename="last", save_on_train_epoch_end=True),
        TQDMProgressBar(refresh_rate=5) if shown else EpochLines(),
    ]
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=max(1, ranks // options.devices),
        # Batch norm's statistics would be exchanged at every forward, and ranks validate unequal numbers of batches.
        strategy=DDPStrategy(broadcast_buffers=False) if ranks > 1 else "auto",
        precision=options.precision,  # type: ignore[arg-type]
        max_epochs=options.epochs,
        limit_train_batches=options.limit_batches,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,  # Knees has its own, under which validation counts nothing twice
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=[CSVLogger(out, "logs"), TensorBoardLogger(out, "tensorboard", "")],
        callbacks=callbacks,
        plugins=[Checkpoints()],
        enable_progress_bar=shown,
        enable_model_summary=False,
    )


class EpochLines(Callback):
    """A line an epoch, where there is no terminal to draw a bar in."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what was logged."""
        known = trainer.callback_metrics
        names = ("train_loss", "val_loss", "val_accuracy")
        shown = ", ".join(f"{name} {float(known[name]):.4f}" for name in names if name in known)
        print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {shown}", flush=True)


def gather_history(out: Path) -> Path:
    """One history.csv of all sessions of a run; where a resumed one repeats an epoch, it comes later.

    (Lightning's logger would start over, and delete what the first session wrote.)
    """
    lines: list[dict[str, str]] = []
    sessions = sorted((out / "logs").glob("version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:]))
    for path in sessions:
        with path.open(encoding="utf-8", newline="") as file:
            lines += csv.DictReader(file)
    names = list(dict.fromkeys(name for line in lines for name in line))
    target = out / "history.csv"
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    os.replace(partial, target)
    return target


def quieten() -> None:
    """Silence advice that does not fit here: batches are one indexing, workers would slow them down."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # its heir is in no older PyTorch
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # between Lightning and PyTorch
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")
