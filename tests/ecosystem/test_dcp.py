"""Distributed checkpoints: saved by two processes, loaded by three or by one, converted to a folder of `pc.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import perceiver_core as pc
from perceiver_core.tensor_parallel import tensor_parallel_plan
from tests.ecosystem.processes import run
from tests.ecosystem.sharded import double, loss_of, own_part
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch has no FSDP2 on CPUs"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # DCP's own, without a group
]

EXACT = {"rtol": 0, "atol": 0}
BLOCKS = (pc.CrossAttend, pc.SelfAttend, pc.JointAttend)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(model: nn.Module) -> nn.Module:
    for block in reversed([module for module in model.modules() if isinstance(module, BLOCKS) and module is not model]):
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, steps: int) -> None:
    for _ in range(steps):
        loss_of(model(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Trains a step, saves, trains another, and returns the weights after both."""
    model, inputs = double(name)
    optimizer = torch.optim.AdamW(sharded(model).parameters(), lr=0.1, eps=1e-2)
    train(model, optimizer, own_part(inputs), 1)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, own_part(inputs), 1)
    return get_model_state_dict(model, options=WHOLE)


def resumed(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Loads the checkpoint into a model with other weights, trains a step, and returns the weights."""
    model, inputs = double(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    optimizer = torch.optim.AdamW(sharded(model).parameters(), lr=0.1, eps=1e-2)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, inputs, 1)  # all samples on each process: the same mean as that of two processes
    return get_model_state_dict(model, options=WHOLE)


@pytest.mark.parametrize("name", ["image", "text"])
def test_two_processes_save_and_three_resume(name: str, tmp_path: Path) -> None:
    """Weights that two names share, and the state of the optimizer, are in it."""
    expected = run(saved, name, tmp_path)[0]
    actual = run(resumed, name, tmp_path, world=3)[0]
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def saved_weights(name: str, folder: Path) -> None:
    dcp.save({"model": get_model_state_dict(sharded(make(name)[0]))}, checkpoint_id=folder)


@pytest.mark.parametrize("name", ["image", "byte_text", "multimodal"])
def test_converted_to_a_folder_of_save(name: str, tmp_path: Path) -> None:
    """In a single process, without a process group."""
    run(saved_weights, name, tmp_path / "dcp")
    expected, inputs = make(name)
    model, _ = MODELS[name]()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    model.load_state_dict(state["model"])
    loaded = pc.load(pc.save(model.eval(), tmp_path / "saved"))
    torch.testing.assert_close(loaded(inputs), expected(inputs), **EXACT)


def test_converted_to_one_file(tmp_path: Path) -> None:
    run(saved_weights, "image", tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    expected, inputs = make("image")
    model, _ = MODELS["image"]()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["model"])
    torch.testing.assert_close(model.eval()(inputs), expected(inputs), **EXACT)


# Without a checkpoint: the whole state dict on one process


def gathered(name: str, folder: Path) -> None:
    model = sharded(make(name)[0])
    weights = get_model_state_dict(model, options=WHOLE)
    if torch.distributed.get_rank() == 0:
        whole, _ = MODELS[name]()
        whole.load_state_dict(weights)
        pc.save(whole, folder)


def scattered(name: str, folder: Path) -> None:
    whole = pc.load(folder)
    expected, inputs = make(name)
    with torch.device("meta"):
        model, _ = MODELS[name]()
    sharded(model.eval()).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if torch.distributed.get_rank() == 0 else {}, options=options)
    torch.testing.assert_close(model(inputs), expected(inputs), **EXACT)


@pytest.mark.parametrize("name", ["image", "text"])
def test_saved_from_shards_and_loaded_into_shards(name: str, tmp_path: Path) -> None:
    """Loaded models are on the meta device until each process has its shard."""
    run(gathered, name, tmp_path / "saved")
    run(scattered, name, tmp_path / "saved", world=3)


def saved_shards(folder: Path) -> None:
    pc.save(sharded(make("image")[0]), folder)


@pytest.mark.refusal
def test_shards_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DTensor.*(quantized or sharded|sharded)"):
        run(saved_shards, tmp_path)


# Tensor parallelism


def saved_heads(folder: Path) -> None:
    model, _ = make("image")
    parallelize_module(model, init_device_mesh("cpu", (2,)), tensor_parallel_plan(model, 2))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def test_heads_of_two_devices_are_loaded_by_one(tmp_path: Path) -> None:
    run(saved_heads, tmp_path)
    expected, inputs = make("image")
    model, _ = MODELS["image"]()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state["model"])
    torch.testing.assert_close(model.eval()(inputs), expected(inputs), **EXACT)
