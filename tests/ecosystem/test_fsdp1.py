"""FullyShardedDataParallel (FSDP1): two processes with a sample each train as one process with both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils._pytree import tree_map

import perceiver_core as pc
from perceiver_core import reads
from perceiver_core.models.perceiver_ar import next_token_loss
from tests.ecosystem.processes import run
from tests.ecosystem.sharded import CLOSE, double, loss_of, own_part
from tests.integration.whole_models import MODELS

pytestmark = pytest.mark.no_shape_checks

BLOCKS = (pc.CrossAttend, pc.SelfAttend, pc.JointAttend)
CPU = torch.device("cpu")


def wrapped(model: nn.Module, original: bool = True, types: tuple[type[nn.Module], ...] = BLOCKS) -> nn.Module:
    policy = ModuleWrapPolicy(types)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=CPU, use_orig_params=original)


def same_training(names: list[str], original: bool, types: tuple[type[nn.Module], ...]) -> None:
    for name in names:
        model, inputs = double(name)
        whole, sharded = copy.deepcopy(model), wrapped(model, original, types)
        outputs = sharded(own_part(inputs))
        expected = whole(inputs)
        torch.testing.assert_close(outputs, tree_map(own_part, expected), **CLOSE)
        for each, outs in ((sharded, outputs), (whole, expected)):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            loss_of(outs).backward()
            optimizer.step()
        with FullyShardedDataParallel.summon_full_params(sharded):
            found = {key.replace("_fsdp_wrapped_module.", ""): value for key, value in sharded.named_parameters()}
            torch.testing.assert_close(found, dict(whole.named_parameters()), **CLOSE)


def test_every_model():
    run(same_training, list(MODELS), True, BLOCKS)


@pytest.mark.parametrize("types", [(), (nn.Linear,)], ids=["root", "linear"])
@pytest.mark.parametrize("original", [True, False])
def test_units(types, original):
    run(same_training, ["image"], original, types)


def other_calls() -> None:
    model, ids = double("text")
    whole, sharded = copy.deepcopy(model), wrapped(model).eval()
    prompt = ids[:, :4]
    actual, expected = (pc.generate(each, prompt, max_new_tokens=7) for each in (sharded, whole))
    assert torch.equal(actual, expected)
    loss = next_token_loss(sharded(ids[:, :-1]), ids)
    torch.testing.assert_close(loss, whole.loss(ids), **CLOSE)
    model, inputs = double("image")
    whole, sharded = copy.deepcopy(model), wrapped(model).eval()
    captures = [reads.AttentionCapture(read=0) for _ in range(2)]
    for each, capture in zip((sharded, whole), captures, strict=True):
        each(inputs, capture=capture)
    torch.testing.assert_close(captures[0].result(), captures[1].result(), **CLOSE)


def test_generate_loss_and_attention_maps():
    run(other_calls)
