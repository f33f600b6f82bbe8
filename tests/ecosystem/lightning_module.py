"""LightningModule around any model of this library, as in docs/how-to/lightning.md."""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

import perceiver_core as pc

# Lightning's own: about few batches, few workers, a module in evaluation, and names that PyTorch no longer likes
WARNINGS = [
    r"ignore:.*does not have many workers",
    r"ignore:The number of training batches",
    r"ignore:Found .* module\(s\) in eval mode",
    r"ignore:.*LeafSpec.* is deprecated",
    r"ignore:Starting from v1.9.0, `tensorboardX`",
    r"ignore:Checkpoint directory .* exists and is not empty",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"ignore:Be aware that when using `ckpt_path`",
]


class Wrapped(lightning.LightningModule):
    """Its hyperparameter is the configuration of a model, which is data: Lightning loads it without unpickling."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = pc.registry.from_config(config)

    def forward(self, inputs: Any) -> Any:
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.model(batch))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def wrapped(model: nn.Module) -> Wrapped:
    """Returns the wrapper around a new model with the weights of `model`, in training."""
    result = Wrapped(pc.registry.to_config(model))
    result.model.load_state_dict(model.state_dict())
    return result


def loss_of(outputs: object) -> Tensor:
    losses: list[Tensor] = [output.float().square().mean() for output in tree_leaves(outputs)]
    return torch.stack(losses).sum()


def batches(inputs: Any, count: int = 4) -> DataLoader:
    """Returns a loader of `count` batches of two samples, all different."""
    generator = torch.Generator().manual_seed(1)

    def varied(x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=generator) if x.is_floating_point() else x

    each = [tree_map(varied, inputs) for _ in range(count)]
    return DataLoader([tree_map(lambda x, i=i: x[i], batch) for batch in each for i in range(2)], batch_size=2)


def trainer(**options: Any) -> lightning.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{**defaults, **quiet, **options})


def quietly() -> None:
    """Ignores these warnings in a process in which pytest does not run."""
    for warning in WARNINGS:
        warnings.filterwarnings("ignore", message=warning.removeprefix("ignore:"))
