"""nn.DataParallel: its own replicas, whose weights are plain tensors and no parameters, on the CPU and in threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate as replicate_module
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import reads
from tests.ecosystem.sharded import CLOSE, double
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.filterwarnings("ignore:nn.ParameterDict is being used with DataParallel:UserWarning"),  # PyTorch's own
]

EXACT = {"rtol": 0, "atol": 0}
MIXED = ("text", "byte_text", "frames", "all_frames", "hierarchical")  # content and positions in one tensor
CASES = [
    pytest.param(name, strategy, id=f"{name}, {strategy}")
    for name in MODELS
    for strategy in (reads.Dense(), reads.Factored(), reads.Structured())
    if name not in MIXED or strategy == reads.Dense()
]


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the part of `replicate` that copies weights to GPUs."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach() if detach else tensor * 1.0 for tensor in tensors] for _ in devices]

    function: Any = replicate_module.__globals__
    monkeypatch.setitem(function, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setitem(function, "_get_device_index", lambda device, optional: device)


def in_threads(replicas: list[nn.Module], inputs: Any) -> list[Any]:
    parts = [tree_map(lambda x, i=i: x.chunk(len(replicas))[i], inputs) for i in range(len(replicas))]
    with ThreadPoolExecutor(len(replicas)) as pool:
        return list(pool.map(lambda replica, part: replica(part), replicas, parts))


def gradients(outputs: list[Any], model: nn.Module) -> tuple[Tensor | None, ...]:
    loss = sum(out.square().sum() for out in tree_leaves(outputs))
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_replicas(name: str, strategy: reads.Strategy) -> None:
    """Each gives the outputs of the model for its samples, and the gradients of the model's weights add up."""
    model, inputs = double(name, strategy)
    replicas = replicate_module(model, [0, 1])
    assert not any(list(replica.parameters()) for replica in replicas)
    outputs, whole = in_threads(replicas, inputs), model(inputs)
    for actual, *parts in zip(tree_leaves(whole), *map(tree_leaves, outputs), strict=True):
        torch.testing.assert_close(torch.cat(parts), actual, **CLOSE)
    torch.testing.assert_close(gradients(outputs, model), gradients(whole, model), **CLOSE)


@pytest.mark.usefixtures("on_the_cpu")
def test_methods_of_replicas() -> None:
    model, ids = make("text")
    (replica,) = replicate_module(model, [0])
    torch.testing.assert_close(replica.loss(ids), model.loss(ids), **EXACT)
    assert torch.equal(pc.generate(replica, ids, max_new_tokens=5), pc.generate(model, ids, max_new_tokens=5))
    model, x = make("image")
    (replica,) = replicate_module(model, [0])
    tokens = model.adapter(x)
    torch.testing.assert_close(
        replica.encoder.attention_map(tokens, read=0), model.encoder.attention_map(tokens, read=0), **EXACT
    )


def test_without_a_gpu_the_wrapper_calls_the_model() -> None:
    model, x = make("image")
    torch.testing.assert_close(nn.DataParallel(model)(x), model(x), **EXACT)
