"""What is trained and how: the loss, the optimizer and its schedule, and how checkpoints are kept."""

from __future__ import annotations

import math
import os
import tempfile
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

WARM_UP = 0.1  # of all steps


class Laterality(LightningModule):
    """Right or left: binary cross-entropy, AdamW, warm-up and cosine over all steps.

    Logs train_loss, train_accuracy, val_loss and val_accuracy once an epoch, each a mean over
    pictures and not over batches, over all ranks. val_loss is without smoothing.

    Args:
        model: pictures `b 1 h w` in [-1, 1] to logits `b 1`, positive = right.
        learning_rate: at its highest.
        weight_decay: of matrices; biases and norms have none.
        label_smoothing: 0.1 makes of the labels 0 and 1 the targets 0.05 and 0.95.

    Raises:
        ValueError: a rate that is not above 0, a negative decay, smoothing outside [0, 1).
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
        """The mean loss of a batch."""
        pictures, labels = batch
        logits = self.model(pictures)[:, 0]
        losses = smoothed_losses(logits, labels, self.label_smoothing)
        self.train_loss.update(losses.detach())
        self.train_accuracy.update(logits.detach().sigmoid(), labels.long())
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return losses.mean()

    def on_validation_epoch_start(self) -> None:
        """Under several ranks, takes the mean of what batch norm has seen on each."""
        for buffer in self.model.buffers():
            if buffer.is_floating_point() and self.trainer.world_size > 1:
                buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts a batch."""
        pictures, labels = batch
        logits = self.model(pictures)[:, 0]
        self.val_loss.update(smoothed_losses(logits, labels, 0.0))
        self.val_accuracy.update(logits.sigmoid(), labels.long())
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and its schedule, which moves every step."""
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_curve(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def smoothed_losses(logits: Float[Tensor, " b"], labels: Float[Tensor, " b"], smoothing: float) -> Float[Tensor, " b"]:
    """Binary cross-entropy of each picture, in nats, with labels drawn `smoothing / 2` towards each other."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def learning_curve(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a straight rise over the first tenth, then half a cosine.

    Args:
        step: from 0; the last one is steps - 1.
        steps: of the whole training.

    Example:
        >>> [round(learning_curve(step, 100), 2) for step in (0, 9, 10, 55, 99)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise)))


def moving_average(average: Tensor, current: Tensor, updates: Tensor) -> Tensor:
    """A mean over about the last hundred steps, or fewer at the start, where old weights are bad ones."""
    keep = ((1 + updates) / (10 + updates)).clamp(max=0.99)
    return average + (1 - keep) * (current - average)


def averaging() -> WeightAveraging:
    """Validates, and keeps as best, a moving average of the weights: steadier than the weights themselves."""
    return WeightAveraging(avg_fn=moving_average, use_buffers=False)  # those of batch norm are means already


class Checkpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and that run nothing when they are loaded.

    (Lightning's own are written in the system's folder for temporary files and moved from there, which
    copies piece by piece where that is another disk; and they are unpickled whole.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes beside `path`, then replaces it in one step."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors, numbers and text only, whatever is asked for.

        Raises:
            ValueError: the file is damaged, or holds anything else.
        """
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded as a checkpoint: {error}") from error
        return checkpoint
