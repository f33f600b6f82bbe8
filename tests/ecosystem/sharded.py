"""What the tests of distributed training compare: outputs, gradients and weights after a step, with one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map

from perceiver_core import reads
from tests.integration.whole_models import make

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64; the order of sums differs
Values = dict[str, Tensor]
Call = Callable[[nn.Module, Any], object]


class Trained(NamedTuple):
    """Outputs of a model, its gradients, and its weights after a step of SGD."""

    outputs: list[Tensor]
    gradients: Values
    weights: Values


def double(name: str, strategy: reads.Strategy | None = None) -> tuple[nn.Module, Any]:
    """Returns a model and its input, two samples, in float64. In evaluation, because batch norms differ by batch."""
    model, inputs = make(name, strategy)
    return model.double(), tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


def own_part(inputs: Any) -> Any:
    """Returns the samples of this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return tree_map(lambda x: x.chunk(world)[rank], inputs)


def loss_of(outputs: object) -> Tensor:
    """Returns a mean over the samples, so that the mean over ranks is that of the whole batch."""
    return sum(out.square().flatten(1).sum(1).mean() for out in tree_leaves(outputs))  # type: ignore[return-value]


def step(model: nn.Module, inputs: Any, call: Call | None = None) -> Trained:
    """Trains a model for a step. `call` replaces `model(inputs)`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    outputs = model(inputs) if call is None else call(model, inputs)
    loss_of(outputs).backward()
    named = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    gradients = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
    optimizer.step()
    return Trained(tree_leaves(outputs), gradients, {name: p.detach() for name, p in named.items()})


def compare(shard: Callable[[nn.Module], nn.Module], model: nn.Module, inputs: Any, call: Call | None = None) -> None:
    """Trains the sharded model on the samples of each rank, and compares it with the model on all samples.

    Args:
        shard: Shards a model in-place, and returns it.
        model: Model; it is copied.
        inputs: Inputs, one sample for each rank.
        call: Replaces `model(inputs)`.
    """
    expected = step(copy.deepcopy(model), inputs, call)
    actual = step(shard(copy.deepcopy(model)), own_part(inputs), call)
    torch.testing.assert_close(actual.outputs, [own_part(out) for out in expected.outputs], **CLOSE)
    for values, references in ((actual.gradients, expected.gradients), (actual.weights, expected.weights)):
        assert values.keys() == references.keys()
        for name, reference in references.items():
            same(values[name], reference, name)


def same(actual: Tensor, expected: Tensor, name: str, **tolerances: float) -> None:
    """Compares a tensor, or this rank's shard of it, with the whole tensor, by default to 1e-10."""
    if isinstance(actual, DTensor):
        expected = distribute_tensor(expected, actual.device_mesh, actual.placements, src_data_rank=None).to_local()
        actual = actual.to_local()
    torch.testing.assert_close(actual, expected, **(tolerances or CLOSE), msg=lambda text: f"{name}: {text}")
