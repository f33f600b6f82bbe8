"""Tensor parallelism: attention heads and hidden channels on two devices give the outputs and gradients of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_map

import perceiver_core as pc
from perceiver_core import adapters, positions, reads
from perceiver_core.tensor_parallel import tensor_parallel_plan
from tests.ecosystem.processes import run
from tests.ecosystem.sharded import CLOSE, double, loss_of
from tests.integration.whole_models import DIM, MODELS, drawn

pytestmark = [pytest.mark.no_shape_checks, pytest.mark.slow]

HEADS = 4
Made = tuple[nn.Module, Any]


def image(**attention: Any) -> Made:
    adapter = adapters.Image(3, positions=positions.LearnedGrid((4, 5), dim=6))
    read = partial(
        pc.CrossAttend, num_heads=HEADS, attention=partial(pc.MultiHeadAttention, qk_dim=16, v_dim=24, **attention)
    )
    block = partial(pc.SelfAttend, attention=partial(pc.MultiHeadAttention, qk_dim=16, **attention))
    encoder = pc.Encoder(
        adapter.dim,
        num_latents=5,
        dim=DIM,
        num_reads=3,
        depth=1,
        num_heads=HEADS,
        cross_attention=read,
        latent_transformer=partial(pc.LatentTransformer, block=block),
    )
    return pc.Perceiver(adapter, encoder, pc.heads.Classification(DIM, 3)), drawn(2, 3, 8, 10)


def gated(activation: nn.Module) -> Made:
    mlp = partial(pc.MLP, widening_factor=2, activation=activation)
    block = partial(pc.SelfAttend, mlp=mlp)
    transformer = partial(pc.LatentTransformer, block=block)
    read = partial(pc.CrossAttend, num_heads=2, mlp=mlp)
    encoder = pc.Encoder(
        6,
        num_latents=5,
        dim=DIM,
        num_reads=2,
        depth=1,
        num_heads=2,
        cross_attention=read,
        latent_transformer=transformer,
    )
    return pc.Perceiver(nn.Identity(), encoder, pc.heads.Identity()), drawn(2, 7, 6)


def language(**attention: Any) -> Made:
    rotary = partial(pc.MultiHeadAttention, rotary=positions.Rotary(), **attention)
    model = pc.PerceiverAR(
        adapters.TokenEmbedding(vocab_size=11, dim=16),
        num_latents=5,
        depth=1,
        num_heads=HEADS,
        cross_attention=partial(pc.CrossAttend, num_heads=HEADS, attention=rotary),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=rotary)),
    )
    return model, torch.arange(26).reshape(2, 13) % 11


CASES: dict[str, Callable[[], Made]] = {
    "image": image,
    "grouped": partial(image, num_kv_heads=2),
    "one key and value": partial(image, num_kv_heads=1),
    "norms": partial(image, qk_norm=nn.LayerNorm),
    "one key, normed": partial(image, qk_norm=nn.RMSNorm, num_kv_heads=1),
    "no bias": partial(image, bias=False, out_bias=False),
    "geglu": partial(gated, pc.GEGLU()),
    "swiglu": partial(gated, pc.SwiGLU()),
    "squared relu": partial(gated, pc.SquaredReLU()),
    "rotary": partial(language, num_kv_heads=2, qk_norm=nn.RMSNorm),
}


OLD = not hasattr(torch.ops.aten, "_fused_rms_norm")  # PyTorch 2.6 computes wrong gradients of a split RMSNorm


def parallel(model: nn.Module, world: int = 2) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (world,)), tensor_parallel_plan(model, world))


def trained(model: nn.Module, inputs: Any) -> tuple[object, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns outputs, gradients, and weights after a step; `full_tensor` sums and joins what the devices have."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = model(inputs)
    loss_of(outputs).backward()

    def whole(x: torch.Tensor) -> torch.Tensor:
        return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()

    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return outputs, gradients, {name: whole(p) for name, p in model.named_parameters()}


def same_training(made: Callable[[], Made], world: int) -> int:
    torch.manual_seed(0)
    model, inputs = made()
    model = model.double().eval()
    inputs = tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    expected = trained(copy.deepcopy(model), inputs)
    split = parallel(model, world)
    torch.testing.assert_close(trained(split, inputs), expected, **CLOSE)
    return sum(isinstance(parameter, DTensor) for parameter in split.parameters())


@pytest.mark.parametrize("case", [case for case in CASES if not OLD or case not in ("one key, normed", "rotary")])
def test_outputs_and_gradients(case: str) -> None:
    first, second = run(same_training, CASES[case], 2)
    assert first == second >= 10


def test_four_devices() -> None:
    assert min(run(same_training, CASES["norms"], 4, world=4)) > 10


def every_model() -> None:
    for name in MODELS:
        same_training(partial(double, name), 2)


def test_every_model() -> None:
    """Attention with one head, and odd numbers of hidden channels, are computed on both devices."""
    run(every_model)


def eager_methods() -> list[int]:
    torch.manual_seed(0)
    model, ids = language(num_kv_heads=2)
    model = model.double().eval()
    split = parallel(copy.deepcopy(model))
    for options in ({}, {"use_cache": False}, {"num_initial_latents": 2}):
        arguments = {"max_new_tokens": 9, **options}
        torch.testing.assert_close(pc.generate(split, ids, **arguments), pc.generate(model, ids, **arguments))
    torch.testing.assert_close(split.loss(ids), model.loss(ids), **CLOSE)
    return list(split.state_dict())


def test_generate_and_loss() -> None:
    model, _ = language(num_kv_heads=2)
    assert run(eager_methods)[0] == list(model.state_dict())


def maps() -> tuple[torch.Tensor, torch.Tensor, str]:
    torch.manual_seed(0)
    model, x = image()
    model = model.eval()
    split = parallel(copy.deepcopy(model))
    reason = str(pc.explain_reads(split, x))
    tokens = model.adapter(x)
    return split.encoder.attention_map(tokens), model.encoder.attention_map(tokens), reason


def test_attention_maps_are_those_of_the_heads_of_a_device() -> None:
    parts = run(maps)
    torch.testing.assert_close(torch.cat([part for part, _, _ in parts], 1), parts[0][1])


@pytest.mark.parametrize("strategy", [reads.Structured(), reads.Factored()], ids=str)
def test_reads_are_dense(strategy: reads.Strategy) -> None:
    """Those that are chosen say why they cannot; `explain_reads` says why they were not chosen."""
    explained = run(maps)[0][2]
    assert "Dense" in explained and "hook" in explained
    with pytest.raises(ValueError, match=r"expects it to be called.*Choose another strategy"):
        run(forced, strategy)


def forced(strategy: reads.Strategy) -> None:
    model, x = image()
    reads.set_strategy(model.encoder, strategy)
    parallel(model)(x)


# Numbers of heads


def test_heads_that_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"num_devices must divide num_heads=4 of encoder.reads.0.attention; got 3"):
        tensor_parallel_plan(image()[0], 3)
    with pytest.raises(ValueError, match=r"num_devices must divide num_kv_heads=2 of the module; got 4"):
        tensor_parallel_plan(pc.MultiHeadAttention(16, num_heads=4, num_kv_heads=2), 4)
    with pytest.raises(ValueError, match="num_devices must be a whole number of at least 1; got 0"):
        tensor_parallel_plan(image()[0], 0)


def own_plan(heads: int) -> None:
    attention = pc.MultiHeadAttention(12, num_heads=heads)
    plan = {name: ColwiseParallel() for name in ("query", "key", "value")} | {"output": RowwiseParallel()}
    parallelize_module(attention, init_device_mesh("cpu", (2,)), plan)
    x = drawn(2, 5, 12)
    torch.testing.assert_close(attention(x).shape, x.shape)


def test_own_plans() -> None:
    run(own_plan, 2)
    with pytest.raises(ValueError, match=r"num_heads must be divisible by the number of devices.*got 3 heads, 4 wide"):
        run(own_plan, 3)


def test_attention_with_one_head_and_odd_mlps_are_not_in_the_plan() -> None:
    assert not tensor_parallel_plan(pc.CrossAttend(7, 5), 2)
    assert sorted(tensor_parallel_plan(pc.CrossAttend(8, 5), 2)) == ["mlp.contract", "mlp.expand"]


# With data parallelism


def two_dimensional() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    torch.manual_seed(0)
    model, x = image()
    model, x = model.double().eval(), x.double()
    whole = copy.deepcopy(model)
    parallelize_module(model, mesh["heads"], tensor_parallel_plan(model, mesh["heads"].size()))
    for block in reversed([m for m in model.modules() if isinstance(m, (pc.CrossAttend, pc.SelfAttend))]):
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    outputs = model(x.chunk(2)[mesh["data"].get_local_rank()])
    expected = whole(x)
    torch.testing.assert_close(outputs, expected.chunk(2)[mesh["data"].get_local_rank()], **CLOSE)
    loss_of(outputs).backward()
    loss_of(expected).backward()
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, **CLOSE, msg=name)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch has no FSDP2 on CPUs")
def test_with_sharded_weights() -> None:
    run(two_dimensional, world=4)
