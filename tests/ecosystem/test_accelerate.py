"""accelerate: training by `Accelerator`, and models whose weights are offloaded or spread over devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.utils import compute_module_sizes, send_to_device
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import masks, reads
from tests.ecosystem import processes
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's, of an RMSNorm under autocast
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
EXACT = {"rtol": 0, "atol": 0}
CPU = torch.device("cpu")
# of each class of models; with tied weights ("text") and several modalities
CLASSES = ("image", "multimodal", "text", "all_frames", "hierarchical")
each_class = pytest.mark.parametrize("name", CLASSES)


# Training


def loss_of(outputs: object) -> Tensor:
    losses: list[Tensor] = [output.float().square().mean() for output in tree_leaves(outputs)]
    return torch.stack(losses).sum()


def train(
    model: nn.Module, inputs: Any, optimizer: Any, backward: Callable[[Tensor], None], bf16: bool = False
) -> list[float]:
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(model(inputs))
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@each_class
def test_a_prepared_model_trains_as_by_itself(name: str, precision: str) -> None:
    """Bit for bit, in bfloat16 too, where accelerate uses autocast and returns float32."""
    model, inputs = make(name)
    plain = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    expected = train(plain, inputs, optimizer, lambda loss: loss.backward(), bf16=precision == "bf16")

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert train(prepared, inputs, optimizer, accelerator.backward) == expected
    assert expected[1] != expected[0]
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped.state_dict(), plain.state_dict(), **EXACT)
    assert {output.dtype for output in tree_leaves(prepared(inputs))} == {torch.float32}


@each_class
def test_a_saved_state_continues_as_without_a_break(name: str, tmp_path: Path) -> None:
    """With tied weights ("text"), too: they are written once."""
    accelerator = Accelerator(cpu=True)
    model, inputs = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    train(model, inputs, optimizer, accelerator.backward)
    accelerator.save_state(str(tmp_path / "state"))
    expected = train(model, inputs, optimizer, accelerator.backward)

    fresh, _ = make(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    accelerator = Accelerator(cpu=True)
    fresh, optimizer = accelerator.prepare(fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-2))
    accelerator.load_state(str(tmp_path / "state"))
    assert train(fresh, inputs, optimizer, accelerator.backward) == expected
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), **EXACT)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_is_saved_unwrapped(precision: str, tmp_path: Path) -> None:
    model, inputs = make("image")
    expected = model(inputs)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared = accelerator.prepare(model)
    again = pc.load(pc.save(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), tmp_path))
    torch.testing.assert_close(again(inputs), expected, **EXACT)


def train_with_another() -> list[dict[str, Tensor]]:
    """Trains in this process, one of two, with one of the two samples of each batch."""
    states = []
    for name in ("image", "multimodal", "text"):
        model, inputs = make(name)
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        prepared, optimizer = accelerator.prepare(model.train(), optimizer)
        rank = accelerator.process_index
        train(prepared, tree_map(lambda x, i=rank: x[i : i + 1], inputs), optimizer, accelerator.backward)
        states.append({key: value.detach() for key, value in accelerator.unwrap_model(prepared).state_dict().items()})
    return states


@pytest.mark.slow
def test_two_processes_train_as_one() -> None:
    for name, state in zip(
        ("image", "multimodal", "text"), processes.run(train_with_another, group=False)[0], strict=True
    ):
        model, inputs = make(name)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            losses = [loss_of(model(tree_map(lambda x, i=i: x[i : i + 1], inputs))) for i in range(2)]
            torch.stack(losses).mean().backward()
            optimizer.step()
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-4, atol=1e-5)


# Offloading


def cpu_offloaded(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def disk_offloaded(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=CPU)


def device_map(model: nn.Module) -> dict[str, str]:
    """Returns a map that alternates between memory and disk.

    Parameters of the model itself stay in memory, and so does its head: accelerate keeps the weights that it shares
    with an embedding on one device only if the map does.
    """
    parts = {name: ("disk" if number % 2 else "cpu") for number, (name, _) in enumerate(model.named_children())}
    return {**parts, "head": "cpu"} if "head" in parts else parts


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    own = {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    return dispatch_model(model, device_map(model) | own, main_device="cpu", offload_dir=str(folder))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "offload"),
    [*((name, cpu_offloaded) for name in MODELS), *((n, f) for n in CLASSES for f in (disk_offloaded, dispatched))],
)
def test_an_offloaded_model(name: str, offload: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    """Weights are loaded when the module that has them runs, so every one must be used there and nowhere else."""
    model, inputs = make(name, reads.Dense())
    expected = model(inputs)
    offloaded = offload(model, tmp_path)
    devices = {parameter.device.type for parameter in offloaded.parameters()}
    assert devices == ({"meta"} if offload is not dispatched else devices | {"meta"})
    torch.testing.assert_close(offloaded(inputs), expected, **EXACT)
    torch.testing.assert_close(offloaded(inputs), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")  # accelerate's own keys
@torch.no_grad()
@each_class
def test_an_inferred_device_map(name: str, tmp_path: Path) -> None:
    """It splits blocks: of one attention, the keys may be in memory and the values on disk."""
    model, inputs = make(name, reads.Dense())
    expected = model(inputs)
    parts = infer_auto_device_map(model, max_memory={"cpu": compute_module_sizes(model)[""] // 2})
    assert set(parts.values()) == {"cpu", "disk"}
    dispatched = dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path))
    torch.testing.assert_close(dispatched(inputs), expected, **EXACT)


@torch.no_grad()
@each_class
def test_an_empty_model_that_loads_and_dispatches_a_checkpoint(name: str, tmp_path: Path) -> None:
    model, inputs = make(name, reads.Dense())
    # accelerate refuses a file without this entry, and save_model leaves it out if there are tied weights.
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with init_empty_weights(include_buffers=True):  # without, accelerate makes two weights of tied ones
        empty = MODELS[name]()[0]
    loaded = load_checkpoint_and_dispatch(
        empty,
        str(tmp_path / "model.safetensors"),
        device_map=device_map(empty),
        offload_folder=str(tmp_path / "offloaded"),
    )
    torch.testing.assert_close(loaded.eval()(inputs), model(inputs), **EXACT)


@torch.no_grad()
def test_a_saved_folder_is_a_checkpoint(tmp_path: Path) -> None:
    """With tied weights: the configuration builds the empty model, and the weights file has the entry above."""
    model, inputs = make("text")
    pc.save(model, tmp_path)
    with init_empty_weights(include_buffers=True):
        empty = pc.registry.from_config(pc.registry.to_config(model))
    loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    torch.testing.assert_close(loaded.eval()(inputs), model(inputs), **EXACT)


@torch.no_grad()
def test_generation_by_an_offloaded_model() -> None:
    model, ids = make("text")
    expected = pc.generate(model, ids[:, :4], max_new_tokens=5)
    actual = pc.generate(cpu_offload(model, execution_device=CPU), ids[:, :4], max_new_tokens=5)
    torch.testing.assert_close(actual, expected, **EXACT)


@torch.no_grad()
def test_attention_maps_of_an_offloaded_model() -> None:
    model, inputs = make("image")
    expected = model.encoder.attention_map(model.adapter(inputs), read=1)
    model = cpu_offload(model, execution_device=CPU)
    actual = model.encoder.attention_map(model.adapter(inputs), read=1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_offloaded_reads_are_dense_and_say_why() -> None:
    model, inputs = make("image")
    why = pc.explain_reads(cpu_offload(model, execution_device=CPU), inputs)[0].why
    assert why.startswith(
        "Structured cannot: the norm or a projection to keys or values has a forward that was replaced"
    )


# Several devices. The meta device stands for the second: it has no values, but operators refuse to mix it with others.

SECOND = torch.device("meta")


def spread(model: nn.Module, first: str) -> nn.Module:
    """Runs the child `first` on the CPU and all others on the second device."""
    parts = {name: ("cpu" if name == first else "meta") for name, _ in model.named_children()}
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return dispatch_model(model, parts | dict.fromkeys(own, "meta"), main_device="cpu", force_hooks=True)


@torch.no_grad()
@pytest.mark.parametrize("name, first", [("image", "adapter"), ("multimodal", "adapter"), ("text", "embedding")])
def test_arguments_follow_a_module_to_its_device(name: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens between an adapter and an encoder on another device, and masks."""
    model, inputs = make(name, reads.Dense())
    options = {"mask": torch.ones(2, 13, dtype=torch.bool)} if name == "text" else {}
    seen = []
    spread(model, first)
    last = model.get_submodule("cross_attention" if name == "text" else "encoder")
    last.register_forward_hook(lambda module, args, output: seen.append(output.device))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # back to the first device
        model(inputs, **options)
    assert seen == [SECOND]


def test_tokens_masks_and_sources_are_moved_and_modules_are_not() -> None:
    norm = nn.LayerNorm(7)
    tokens = pc.Tokens(torch.rand(2, 3, 5, 4), (torch.rand(3, 1, 3), torch.rand(1, 5, 3)), torch.rand(2, 3, 5) > 0)
    mask = masks.and_(masks.Padding(torch.ones(2, 15).bool()), masks.Causal(), masks.Queries(torch.ones(2, 7).bool()))
    either = masks.or_(masks.Padding(torch.ones(2, 15).bool()), masks.Window(1, 1))
    source = reads.Source(tokens, norm, reads.Dense(), mask, torch.arange(15), num_queries=7)
    moved, other = send_to_device((source, {"mask": either}), SECOND)
    assert moved.norm is norm and moved.num_queries == 7 and norm.weight.device == CPU
    each = [moved.tokens.content, *moved.tokens.position_tables, moved.tokens.mask, moved.positions]
    each += [moved.mask.masks[0].keys, moved.mask.masks[2].queries, other["mask"].masks[0].keys]
    assert {x.device for x in each} == {SECOND}
    assert moved.mask.masks[1] == masks.Causal() and moved.tokens.mask.dtype == torch.bool
