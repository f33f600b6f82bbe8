"""Lightning in two processes: DDP, and FSDP2 by `ModelParallelStrategy`, against one process."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

import perceiver_core as pc
from tests.ecosystem import processes
from tests.ecosystem.lightning_module import Wrapped, batches, loss_of, quietly, trainer, wrapped
from tests.integration.whole_models import make

pytestmark = [pytest.mark.no_shape_checks, pytest.mark.slow]
NAMES = ("image", "multimodal", "text")


class Sharded(Wrapped):
    """Blocks and the model are units of FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.modules():
            if isinstance(block, (pc.CrossAttend, pc.SelfAttend, pc.JointAttend)):
                fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def fit(kind: str) -> list[dict[str, torch.Tensor]]:
    """Trains each model in this process, one of two, with one of the two samples of each batch."""
    quietly()
    states = []
    for name in NAMES:
        model, inputs = make(name)
        if kind == "ddp":
            module, strategy = wrapped(model), DDPStrategy(process_group_backend="gloo")
        else:
            module = Sharded(pc.registry.to_config(model))
            module.model.load_state_dict(model.state_dict())
            strategy = ModelParallelStrategy(  # type: ignore[assignment]
                data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
            )
        own = DataLoader(batches(inputs).dataset[int(os.environ["RANK"]) :: 2], batch_size=1)  # type: ignore[index]
        run = trainer(max_epochs=1, devices=2, strategy=strategy, use_distributed_sampler=False)
        run.fit(module, own)
        whole = get_model_state_dict(module.model, options=StateDictOptions(full_state_dict=True))
        states.append({key: value.cpu() for key, value in whole.items()})
    return states


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind: str) -> None:
    results = processes.run(fit, kind, group=False)
    for number, name in enumerate(NAMES):
        model, inputs = make(name)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for batch in batches(inputs):
            optimizer.zero_grad()
            losses = [loss_of(model(tree_map(lambda x, i=i: x[i : i + 1], batch))) for i in range(2)]
            torch.stack(losses).mean().backward()
            optimizer.step()
        state = results[0][number]
        for key, weight in model.named_parameters():
            torch.testing.assert_close(state[key], weight.detach(), rtol=1e-4, atol=1e-5)
