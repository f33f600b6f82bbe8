"""transformers: a model in a `PreTrainedModel`, whose `PretrainedConfig` holds its constructor calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModel

import perceiver_core as pc
from tests.ecosystem.pretrained import Wrapped, WrappedConfig, wrapped
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # transformers', which says activation_checkpointing now; earlier versions know only these names
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(enable|disable)` is deprecated:FutureWarning"),
]
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # loaded weights lie elsewhere in memory, and MKL then rounds differently
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """The weights, buffers (of "padded_stem") and ties ("text") come back; nothing is initialized anew."""
    model, inputs = make(name)
    wrapped(model).save_pretrained(tmp_path)
    again, report = Wrapped.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not again.training
    torch.testing.assert_close(again.model.state_dict(), model.state_dict(), **EXACT)
    torch.testing.assert_close(again(inputs)["logits"], model(inputs), **CLOSE)
    assert len({*again.parameters()}) == len({*model.parameters()})  # tied weights are tied


def test_the_files(tmp_path: Path) -> None:
    model, inputs = make("text")
    wrapped(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"] == pc.registry.to_config(model) and config["model_type"] == "perceiver-core"
    pc.save(Wrapped.from_pretrained(tmp_path).model, tmp_path / "own")
    torch.testing.assert_close(pc.load(tmp_path / "own")(inputs), model(inputs), **CLOSE)


def test_a_new_model_is_initialized_by_its_parts() -> None:
    model, _ = MODELS["image"]()
    config = WrappedConfig(pc.registry.to_config(model))
    torch.manual_seed(3)
    expected = pc.registry.from_config(config.model)
    torch.manual_seed(3)
    torch.testing.assert_close(Wrapped(config).model.state_dict(), expected.state_dict(), **EXACT)


def test_auto_classes(tmp_path: Path) -> None:
    AutoConfig.register("perceiver-core", WrappedConfig, exist_ok=True)
    AutoModel.register(WrappedConfig, Wrapped, exist_ok=True)
    model, inputs = make("image")
    wrapped(model).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, Wrapped)
    torch.testing.assert_close(again(inputs)["logits"], model(inputs), **CLOSE)


@pytest.mark.parametrize("name", ["image", "multimodal", "text", "all_frames", "hierarchical"])
def test_loaded_in_bfloat16(name: str, tmp_path: Path) -> None:
    """As `model.bfloat16()`. Token ids and categories stay integers."""
    model, inputs = make(name)
    wrapped(model).save_pretrained(tmp_path)
    again = Wrapped.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in again.parameters()} == {torch.bfloat16}
    halved = tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)
    torch.testing.assert_close(again(halved)["logits"], model.bfloat16()(halved), rtol=0.05, atol=0.05)


def test_gradient_checkpointing() -> None:
    """The same gradients, bit for bit, with fewer stored activations."""
    model, inputs = make("image")
    labels = torch.tensor([2, 0])
    gradients, stored = [], []
    plain = wrapped(model).train()
    recomputing = wrapped(model).train()
    recomputing.gradient_checkpointing_enable()
    switched_off = wrapped(model).train()
    switched_off.gradient_checkpointing_enable()
    switched_off.gradient_checkpointing_disable()
    for each in (plain, recomputing, switched_off):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            loss = each(inputs, labels)["loss"]
        loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
        stored.append(sum(sizes))
    torch.testing.assert_close(gradients[1:], gradients[:1] * 2, **EXACT)
    assert stored[1] < 0.5 * stored[0] and stored[2] == stored[0]


def test_a_device_map(tmp_path: Path) -> None:
    """transformers dispatches with accelerate: the weights of the encoder are on disk."""
    model, inputs = make("image", pc.reads.Dense())
    wrapped(model).save_pretrained(tmp_path)
    parts = {"model.adapter": "cpu", "model.encoder": "disk", "model.head": "cpu"}
    again = Wrapped.from_pretrained(tmp_path, device_map=parts, offload_folder=str(tmp_path / "offloaded"))
    assert {weight.device.type for weight in again.model.encoder.parameters()} == {"meta"}
    with torch.no_grad():
        outputs = again(inputs)["logits"]
    torch.testing.assert_close(outputs, model(inputs), **CLOSE)
