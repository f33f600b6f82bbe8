"""DistributedDataParallel: two processes with a sample each train as one process with both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import perceiver_core as pc
from perceiver_core.models.perceiver_ar import next_token_loss
from tests.ecosystem.processes import run
from tests.ecosystem.sharded import CLOSE, compare, double, loss_of, own_part, step
from tests.integration.whole_models import MODELS

pytestmark = pytest.mark.no_shape_checks

Wrap = Callable[[nn.Module], nn.Module]


def recompute(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(pc.checkpoint_activations(model))


def recompute_reentrant(model: nn.Module) -> nn.Module:
    """Checkpoints the latent transformers, which steps share; a static graph is what reentrant checkpoints need."""
    for module in list(model.modules()):
        if isinstance(module, pc.LatentTransformer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=True)
    return DistributedDataParallel(model, static_graph=True)


WRAPS: dict[str, Wrap] = {
    "plain": DistributedDataParallel,
    "recompute": recompute,
    "reentrant": recompute_reentrant,
    "static graph": partial(DistributedDataParallel, static_graph=True),
    "buckets are gradients": partial(DistributedDataParallel, gradient_as_bucket_view=True),
}
SOME = ("image", "multimodal", "text")  # reads that share weights; one modality that is not seen; tied weights


def same_training(wrap: Wrap, names: list[str]) -> None:
    for name in names:
        model, inputs = double(name)
        compare(wrap, model, inputs)


def test_every_model() -> None:
    """The gradients, the outputs and the weights after a step, in float64 to 1e-10."""
    run(same_training, DistributedDataParallel, list(MODELS))


@pytest.mark.parametrize("wrap", list(WRAPS)[1:])
def test_options(wrap: str) -> None:
    run(same_training, WRAPS[wrap], ["image"] if wrap == "reentrant" else list(SOME))


# Weights that some processes do not use


def multimodal(rank: int) -> tuple[nn.Module, Any]:
    """Returns a model and the samples of a rank, without a table on rank 0."""
    model, inputs = double("multimodal")
    part = {name: tree_map(lambda x: x.chunk(2)[rank], x) for name, x in inputs.items()}
    if rank == 0:
        part.pop("table")
    return model, part


def unused_modality(find_unused: bool) -> None:
    parts = [multimodal(rank)[1] for rank in range(2)]
    model, _ = multimodal(0)
    expected = copy.deepcopy(model)
    (sum(loss_of(expected(part)) for part in parts) / 2).backward()
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    for _ in range(2):  # without find_unused_parameters, the second pass is refused
        wrapped.zero_grad()
        loss_of(wrapped(parts[dist.get_rank()])).backward()
    for (name, actual), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        gradient = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(actual.grad, gradient, **CLOSE, msg=name)


def test_a_modality_that_a_process_does_not_have() -> None:
    run(unused_modality, True)


@pytest.mark.refusal
def test_unused_weights_must_be_announced() -> None:
    """PyTorch's own rule, with its own message."""
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        run(unused_modality, False)


# Random draws, with an own generator, under recomputation


def drawing(generator: torch.Generator | None) -> nn.Module:
    torch.manual_seed(0)
    encoder = partial(pc.Encoder, num_latents=8, dim=12, num_reads=3, depth=1, num_heads=2)
    model = pc.Perceiver(
        nn.Identity(), encoder(7, latent_dropout=pc.DropLatents(0.5, generator=generator)), pc.heads.Regression(12)
    )
    return model.double().train()


def draws(checkpointed: bool) -> None:
    x = torch.rand(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)  # type: ignore[no-any-return]

    expected = step(drawing(torch.Generator().manual_seed(3)), x)
    actual = step(DistributedDataParallel(drawing(torch.Generator().manual_seed(3))), x, call)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_random_draws_are_repeated(checkpointed: bool) -> None:
    run(draws, checkpointed)


# A loss that is computed from the output


def language_model() -> None:
    model, ids = double("text")
    wrapped, part = DistributedDataParallel(copy.deepcopy(model)), own_part(ids)
    next_token_loss(wrapped(part[:, :-1]), part).backward()
    model.loss(ids).backward()
    for (name, actual), expected in zip(wrapped.module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, **CLOSE, msg=name)


def test_next_token_loss() -> None:
    run(language_model)
