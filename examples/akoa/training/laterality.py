"""Training objective of the knee model: loss, optimizer, schedule, weight averaging, and checkpoints."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from perceiver_core.atomic_files import write_atomically
from perceiver_core.interop.weight_files.zip_archive import verify_archive

WARM_UP = 0.1  # share of all steps


class Laterality(LightningModule):
    """Lightning module for right or left: binary cross-entropy, AdamW, linear warm-up and cosine decay over all steps.

    It logs train_loss, train_accuracy, val_loss and val_accuracy once an epoch, each a mean over images rather than
    batches, and over all ranks. val_loss is computed without label smoothing.

    Args:
        model: Module from images `b 1 h w` in [-1, 1] to logits `b 1`, positive for right.
        learning_rate: Highest learning rate.
        weight_decay: Weight decay of matrices; biases and norms have none.
        label_smoothing: Label smoothing; 0.1 turns the labels 0 and 1 into the targets 0.05 and 0.95.

    Raises:
        ValueError: The learning rate is not above 0, the weight decay is negative, or the smoothing is outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or weight_decay < 0 or not 0 <= label_smoothing < 1:
            raise ValueError(
                "need learning_rate > 0, weight_decay >= 0 and label_smoothing in [0, 1); "
                f"got {learning_rate}, {weight_decay} and {label_smoothing}"
            )
        self.model = model
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.label_smoothing = label_smoothing
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.train_accuracy, self.val_accuracy = BinaryAccuracy(), BinaryAccuracy()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        images, labels = batch
        logits = self.model(images)[:, 0]
        losses = smoothed_losses(logits, labels, self.label_smoothing)
        self.train_loss.update(losses.detach())
        self.train_accuracy.update(logits.detach().sigmoid(), labels.long())
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return losses.mean()

    def on_validation_start(self) -> None:
        """Average the statistics of batch norm over ranks, since checkpoints contain only those of the first rank."""
        self._average_buffers()

    def on_validation_epoch_start(self) -> None:
        """Average the statistics again: weight averaging has exchanged the weights, and its copy of the statistics."""
        self._average_buffers()

    def _average_buffers(self) -> None:
        for buffer in self.model.buffers():
            if buffer.is_floating_point() and self.trainer.world_size > 1:
                buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        images, labels = batch
        logits = self.model(images)[:, 0]
        self.val_loss.update(smoothed_losses(logits, labels, 0.0))
        self.val_accuracy.update(logits.sigmoid(), labels.long())
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with its schedule, which is updated every step."""
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups: list[dict[str, object]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def smoothed_losses(logits: Float[Tensor, " b"], labels: Float[Tensor, " b"], smoothing: float) -> Float[Tensor, " b"]:
    """Binary cross-entropy of each image in nats, with labels moved towards each other by `smoothing / 2`."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def learning_rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at a step: a linear rise over the first tenth, then half a cosine.

    Args:
        step: Step, from 0 to steps - 1.
        steps: Number of steps of the whole training.

    Example:
        >>> [round(learning_rate_factor(step, 100), 2) for step in (0, 9, 10, 55, 99)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise)))


def moving_average(average: Tensor, current: Tensor, updates: Tensor) -> Tensor:
    """Update a moving average over about the last hundred steps.

    The window is shorter at first, since early weights are poor.
    """
    keep = ((1 + updates) / (10 + updates)).clamp(max=0.99)
    return average + (1 - keep) * (current - average)


def weight_averaging() -> WeightAveraging:
    """Callback that validates and saves a moving average of the weights, which varies less than the weights."""
    return WeightAveraging(avg_fn=moving_average, use_buffers=False)  # buffers of batch norm are averages already


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are written completely or not at all, and that execute no code when they are loaded.

    Lightning's own checkpoints are written in the system's temporary folder and moved from there, which is not atomic
    on another disk, and they are unpickled without restriction.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | os.PathLike[str], storage_options: object | None = None
    ) -> None:
        """Write a checkpoint atomically. Its folder is created if necessary."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({target: partial(_write_checkpoint, checkpoint)})

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors, numbers and text only, whatever `weights_only` is.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged, or contains anything else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        try:
            verify_archive(Path(path))  # torch.load ignores the checksums in the file
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded as a checkpoint: {error}") from error
        return checkpoint


def _write_checkpoint(checkpoint: dict[str, object], path: Path) -> None:
    with path.open("wb") as file:  # with a path instead, the temporary name would be part of the content
        torch.save(checkpoint, file)
