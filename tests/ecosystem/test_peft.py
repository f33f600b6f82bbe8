"""peft: adapters of every class of models, by the names of the layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from perceiver_core.reads import Dense, Structured
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# The projections of every attention. A plain "output" would name the last layer of a Decoder too, see below.
PROJECTIONS = ["attention.query", "attention.key", "attention.value", "attention.output"]
each_model = pytest.mark.parametrize("name", MODELS)
each_class = pytest.mark.parametrize("name", ["image", "multimodal", "text", "all_frames", "hierarchical"])


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": PROJECTIONS, "r": 2, "lora_alpha": 4, **options})


def loss_of(outputs: object) -> Tensor:
    losses: list[Tensor] = [output.square().mean() for output in tree_leaves(outputs)]
    return torch.stack(losses).sum()


def trained(name: str, config: Any) -> tuple[PeftModel, nn.Module, Any]:
    """Returns a model with adapters after two steps, the model without them, and inputs, all in evaluation."""
    model, inputs = make(name)
    adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))  # peft writes to it
    torch.testing.assert_close(adapted.eval()(inputs), model(inputs), **CLOSE)  # adapters change nothing at first
    # Statistics of a batch norm in a stem are no adapters; peft does not save them.
    adapted.train().apply(lambda module: module.eval() if isinstance(module, nn.BatchNorm2d) else None)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(adapted(inputs)).backward()
        optimizer.step()
    return adapted.eval(), model, inputs


CONFIGS = {
    "LoRA": lora(),
    "LoRA of all linear layers": lora(target_modules="all-linear"),
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(target_modules=["attention.key", "attention.value"], feedforward_modules=[]),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((n, "LoRA") for n in MODELS),
        *((n, m) for n in ("image", "multimodal", "text") for m in CONFIGS if m != "LoRA"),
    ],
)
def test_adapters(name: str, method: str, tmp_path: Path) -> None:
    """Only they train; the model with them merged, saved and loaded, or removed, is the same."""
    adapted, model, inputs = trained(name, CONFIGS[method])
    outputs, plain = adapted(inputs), model(inputs)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(tree_leaves(outputs), tree_leaves(plain), strict=True))
    base = {key.replace("base_model.model.", "").replace(".base_layer", ""): p for key, p in adapted.named_parameters()}
    for key, weight in model.named_parameters():
        torch.testing.assert_close(base[key], weight, **EXACT)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(inputs), plain, **CLOSE)

    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(again(inputs), outputs, **CLOSE)
    torch.testing.assert_close(copy.deepcopy(adapted).unload()(inputs), plain, **CLOSE)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(inputs), outputs, rtol=1e-3, atol=1e-4)
    loaded = pc.load(pc.save(merged, tmp_path / "merged"))  # it is a model of this library again
    torch.testing.assert_close(loaded(inputs), merged(inputs), **CLOSE)


@each_class
def test_every_attention_has_adapters(name: str) -> None:
    model, _ = make(name)
    attentions = [key for key, part in model.named_modules() if isinstance(part, pc.MultiHeadAttention)]
    adapted = get_peft_model(model, lora())
    names = {key for key, _ in adapted.named_parameters() if "lora_A" in key}
    assert attentions
    expected = {
        f"base_model.model.{a}.{p}.lora_A.default.weight"
        for a in attentions
        for p in ("query", "key", "value", "output")
    }
    assert names == expected


def test_a_new_head_is_trained_and_saved_with_the_adapters(tmp_path: Path) -> None:
    adapted, model, inputs = trained("image", lora(modules_to_save=["head"]))
    outputs = adapted(inputs)
    heads = {key: p for key, p in adapted.named_parameters() if "modules_to_save.default" in key}
    assert {key.rpartition("default.")[2] for key in heads} == {key for key, _ in model.head.named_parameters()}
    for key, weight in heads.items():
        assert not torch.equal(weight, model.head.get_parameter(key.rpartition("default.")[2]))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(again(inputs), outputs, **CLOSE)
    torch.testing.assert_close(adapted.merge_and_unload()(inputs), outputs, rtol=1e-3, atol=1e-4)


def test_latents_are_a_target_too() -> None:
    """peft adapts parameters by name, such as the latent array, in the module that has them."""
    adapted, _, inputs = trained("image", lora(target_parameters=["encoder.latents"]))
    assert any("latents" in key or "encoder.lora" in key for key, p in adapted.named_parameters() if p.requires_grad)
    outputs = adapted(inputs)
    torch.testing.assert_close(adapted.merge_and_unload()(inputs), outputs, rtol=1e-3, atol=1e-4)


def test_generation_with_adapters() -> None:
    adapted, _, ids = trained("text", lora())
    actual = pc.generate(adapted, ids[:, :4], max_new_tokens=5)
    torch.testing.assert_close(actual, pc.generate(adapted.merge_and_unload(), ids[:, :4], max_new_tokens=5), **EXACT)


def test_activation_checkpointing_of_adapters() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model, inputs = make("image")
        adapted = get_peft_model(model, lora())
        if recompute:
            pc.checkpoint_activations(adapted)
        loss_of(adapted(inputs)).backward()
        gradients.append({key: p.grad for key, p in adapted.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, **EXACT)


# Structured reads


def large() -> tuple[nn.Module, Tensor]:
    """Returns a model of images so large that reads of them are structured."""
    where = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=128)
    image = pc.adapters.Image(3, positions=where)
    encoder = pc.Encoder(image.dim, num_latents=32, dim=32, num_reads=2, depth=1, num_heads=4)
    return pc.Perceiver(image, encoder, pc.heads.Classification(32, 5)).eval(), torch.rand(1, 3, 128, 128)


def strategies(model: nn.Module, inputs: Tensor) -> list[type]:
    return [type(read.strategy) for read in pc.explain_reads(model, inputs)]


@torch.no_grad()
def test_structured_reads() -> None:
    """They use the weights of keys and values, so they return when the adapters of these are merged into them."""
    model, inputs = large()
    if strategies(model, inputs) != [Structured] * 2:
        pytest.skip("no compiled kernel")  # as without a C++ compiler
    adapted = get_peft_model(copy.deepcopy(model), lora(init_lora_weights=False))
    assert strategies(adapted, inputs) == [Dense] * 2
    why = "the projection to keys or values is a peft.tuners.lora.layer.Linear, not a plain nn.Linear"
    assert f"Structured cannot: {why}" in pc.explain_reads(adapted, inputs)[0].why
    outputs = adapted(inputs)
    merged = adapted.merge_and_unload()
    assert strategies(merged, inputs) == [Structured] * 2
    torch.testing.assert_close(merged(inputs), outputs, rtol=1e-3, atol=1e-4)

    queries = get_peft_model(copy.deepcopy(model), lora(target_modules=["attention.query", "attention.output"]))
    assert strategies(queries, inputs) == [Structured] * 2


# Names


def test_a_name_that_is_a_linear_layer_in_some_models_only() -> None:
    """peft refuses "output" for a Decoder without `out_dim`, whose layer of this name does nothing."""
    model, _ = make("points")
    with pytest.raises(ValueError, match=r"Target module Identity\(\) is not supported"):
        get_peft_model(model, lora(target_modules=["output"]))
    assert get_peft_model(make("points")[0], lora(target_modules=["attention.output"]))
