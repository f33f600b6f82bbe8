"""fully_shard (FSDP2): two processes with a sample each train as one process with both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import adapters, positions, queries, reads
from perceiver_core.models.perceiver_ar import next_token_loss
from tests.ecosystem.processes import run
from tests.ecosystem.sharded import CLOSE, compare, double, loss_of, own_part, same
from tests.integration.whole_models import DIM, MODELS, drawn, encoder, make

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch has no FSDP2 on CPUs"),
]

Units = Callable[[nn.Module], list[nn.Module]]
BLOCKS = (pc.CrossAttend, pc.SelfAttend, pc.JointAttend)


def of_types(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Returns the modules of these types, children before their parents."""
    return [module for module in model.modules() if isinstance(module, types)][::-1]


def with_weights(model: nn.Module) -> list[nn.Module]:
    """Returns the modules with weights of their own, apart from those that are never called."""
    return [m for m in model.modules() if m._parameters and not isinstance(m, nn.ParameterDict)][::-1]


UNITS: dict[str, Units] = {
    "root": lambda model: [],
    "blocks": lambda model: of_types(model, BLOCKS),
    "parts": lambda model: [part for part in model.children() if [*part.parameters()]],
    "attention": lambda model: of_types(model, (pc.MultiHeadAttention, pc.MLP)),
    "linear": lambda model: of_types(model, (nn.Linear,)),
    "smallest": with_weights,
}


def sharded(units: str, model: nn.Module, **options: Any) -> nn.Module:
    for unit in UNITS[units](model):
        if unit is not model:
            fully_shard(unit, **options)
    return fully_shard(model, **options)


def same_training(units: str, names: list[str], reshard: bool, strategy: reads.Strategy | None = None) -> None:
    for name in names:
        model, inputs = double(name, strategy)
        compare(partial(sharded, units, reshard_after_forward=reshard), model, inputs)


def test_every_model() -> None:
    run(same_training, "blocks", list(MODELS), True)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("units", UNITS)
def test_units(units: str, reshard: bool) -> None:
    """Reads that share their weights, parts that return their own weights, and methods besides forward."""
    run(same_training, units, ["image" if reshard else "multimodal"], reshard)


@pytest.mark.parametrize("strategy", [reads.Structured(), reads.Factored(), reads.Dense()], ids=str)
def test_strategies(strategy: reads.Strategy) -> None:
    run(same_training, "blocks", ["image"], False, strategy)


# Policies


def mixed(name: str, strategy: reads.Strategy | None = None) -> None:
    """Compares with a copy in bfloat16, whose gradients are averaged in float32."""
    model, inputs = make(name, strategy)
    half = copy.deepcopy(model).bfloat16()
    parts = [tree_map(lambda x, rank=rank: x.chunk(2)[rank], inputs) for rank in range(2)]
    halves = [tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, part) for part in parts]
    gradients = []
    for part in halves:
        loss_of(half(part)).backward()
        gradients.append([None if p.grad is None else p.grad.float() for p in half.parameters()])
        half.zero_grad()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded("blocks", model, mp_policy=policy)
    rank = dist.get_rank()
    outputs = model(parts[rank])
    assert all(out.dtype == torch.bfloat16 for out in tree_leaves(outputs))
    torch.testing.assert_close(tree_leaves(outputs), tree_leaves(half(halves[rank])), rtol=0, atol=0)
    loss_of(outputs).backward()
    for (key, parameter), first, second in zip(model.named_parameters(), *gradients, strict=True):
        assert parameter.dtype == torch.float32
        if first is not None:
            assert parameter.grad is not None
            same(parameter.grad, (first + second) / 2, key, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", ["image", "multimodal", "text", "all_frames"])
def test_mixed_precision(name: str) -> None:
    run(mixed, name)


@pytest.mark.parametrize("strategy", [reads.Structured(), reads.Factored()], ids=str)
def test_mixed_precision_of_strategies(strategy: reads.Strategy) -> None:
    """Keys and values that reads share are in float32, in factored form."""
    run(mixed, "image", strategy)


def offloaded() -> None:
    for name in ("image", "text"):
        model, inputs = double(name)
        policy = CPUOffloadPolicy(pin_memory=False)
        compare(partial(sharded, "blocks", offload_policy=policy), model, inputs)


def test_cpu_offload() -> None:
    run(offloaded)


def recomputed() -> None:
    for name in ("image", "text", "frames"):
        model, inputs = double(name)
        compare(lambda model: sharded("blocks", pc.checkpoint_activations(model)), model, inputs)


def test_recomputed_activations() -> None:
    run(recomputed)


# Methods besides forward, and other calls of forward


def attention_maps(policy: MixedPrecisionPolicy) -> None:
    for name in ("image", "multimodal"):
        model, inputs = double(name)
        whole = copy.deepcopy(model)
        sharded("blocks", model, mp_policy=policy)
        for read in (0, -1):
            captures = [reads.AttentionCapture(read=read, queries=[0, 3]) for _ in range(2)]
            for each, capture in zip((model, whole), captures, strict=True):
                each(own_part(inputs), capture=capture)
            torch.testing.assert_close(captures[0].result(), captures[1].result(), **CLOSE)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_attention_maps_by_forward(dtype: torch.dtype | None) -> None:
    """With a dtype, PyTorch copies the arguments of a module to cast their tensors."""
    run(attention_maps, MixedPrecisionPolicy(param_dtype=dtype))


def encoder_alone() -> None:
    made = encoder(7).double()
    whole, x = copy.deepcopy(made), drawn(2, 11, 7).double()
    sharded("blocks", made)
    torch.testing.assert_close(made.attention_map(x, read=0), whole.attention_map(x, read=0), **CLOSE)
    resampler = pc.Resampler(12, num_latents=3, depth=2, num_heads=2).double()
    whole_resampler = copy.deepcopy(resampler)
    sharded("blocks", resampler)
    x = drawn(2, 7, 12).double()
    torch.testing.assert_close(resampler.attention_map(x), whole_resampler.attention_map(x), **CLOSE)


def test_attention_maps_of_parts_that_are_the_root() -> None:
    run(encoder_alone)


def generated() -> None:
    for name, options in (("text", {}), ("byte_text", {"use_cache": False}), ("byte_text", {"num_initial_latents": 2})):
        model, ids = double(name)
        whole = copy.deepcopy(model)
        sharded("blocks", model)
        prompt = ids[:, :4]
        arguments = {"max_new_tokens": 7, **options}
        assert torch.equal(pc.generate(model, prompt, **arguments), pc.generate(whole, prompt, **arguments))


def test_generate() -> None:
    run(generated)


def trained_losses() -> None:
    """Prefix dropout draws from a generator with the same seed, on the same ids, so all ranks and models draw alike."""
    embedding = adapters.TokenEmbedding(vocab_size=11, dim=DIM, positions=positions.LearnedEmbedding(13, dim=DIM))
    torch.manual_seed(0)
    model = pc.PerceiverAR(embedding, num_latents=5, depth=1, num_heads=2, prefix_dropout=0.5).double().train()
    whole, ids = copy.deepcopy(model), torch.arange(26).reshape(2, 13) % 11
    sharded("blocks", model)
    for each in (model, whole):
        each.loss(ids, generator=torch.Generator().manual_seed(3)).backward()
    for (name, actual), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert actual.grad is not None and expected.grad is not None
        same(actual.grad, expected.grad, name)
    logits = model(ids[:, :-1], generator=torch.Generator().manual_seed(3))
    expected = whole.loss(ids, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(next_token_loss(logits, ids), expected, **CLOSE)


def test_loss_with_prefix_dropout() -> None:
    run(trained_losses)


# Modules that return what they own


class Alone(nn.Module):
    """Calls a part by itself, as a unit of its own."""

    def __init__(self, part: nn.Module, *args: Any) -> None:
        super().__init__()
        self.part, self.args = part, args

    def forward(self, x: Tensor) -> Tensor:
        out = self.part(*self.args)
        out = out[0] if isinstance(out, tuple) else out
        return x + (out.materialize() if isinstance(out, pc.Tokens) else out).flatten(0, -2).sum(0)


PARTS: dict[str, Callable[[], tuple[object, ...]]] = {
    "queries": lambda: (queries.Learned(7, 3),),
    "selected queries": lambda: (queries.Learned(7, 3), None, torch.tensor([6, 0])),
    "grid at its own size": lambda: (positions.LearnedGrid((5, 2), 3), (5, 2), torch.zeros(()).double()),
    "grid at another size": lambda: (positions.LearnedGrid((5, 2), 3), (4, 3), torch.zeros(()).double()),
    "embedding": lambda: (positions.LearnedEmbedding(5, 3), torch.arange(5)),
    "tokens": lambda: (adapters.TokenEmbedding(5, 3), torch.arange(5)[None]),
    "queries on a grid": lambda: (
        *(queries.Grid(None, positions.LearnedGrid((5, 2), 3)), pc.Tokens(torch.zeros(1, 5, 2, 1).double())),
    ),
}


def part_alone() -> None:
    for make_part in PARTS.values():
        part, *args = make_part()
        assert isinstance(part, nn.Module)
        model = Alone(part, *args).double()

        def shard(model: nn.Module) -> nn.Module:
            for child in with_weights(model):
                fully_shard(child)
            return fully_shard(model)

        compare(shard, model, drawn(2, 3).double())


def test_parts_that_return_their_weights() -> None:
    run(part_alone)


# What is not reached


def structured_with_sharded_norm() -> str:
    model, inputs = make("image", reads.Structured())
    sharded("smallest", model)
    model(inputs)
    return ""


@pytest.mark.refusal
def test_a_read_that_is_sharded_by_layers_is_dense() -> None:
    """Automatic strategies choose dense reads, as above; a strategy that was chosen says why it cannot."""
    with pytest.raises(ValueError, match=r"the norm is a FSDPLayerNorm.*Choose another strategy"):
        run(structured_with_sharded_norm)


# Replicas of shards


def hybrid() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, inputs = double("image")
    inputs = torch.cat([inputs, inputs.flip(1)])
    compare(partial(sharded, "blocks", mesh=mesh), model, inputs)


def test_hybrid_sharding() -> None:
    run(hybrid, world=4)
