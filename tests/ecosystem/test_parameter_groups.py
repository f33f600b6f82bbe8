"""`parameter_groups` of a model inside peft: only the adapters are trained, at the rates of their blocks."""

from __future__ import annotations

import peft
import pytest

import perceiver_core as pc
from tests.integration.whole_models import make

pytestmark = pytest.mark.no_shape_checks


@pytest.mark.parametrize("name", ["image", "multimodal", "text", "frames", "hierarchical"])
def test_adapters_learn_at_the_rates_of_their_blocks(name):
    model, _ = make(name)
    options = {"weight_decay": 0.1, "layer_decay": 0.5, "lr": 0.1}
    rates = {id(p): group["lr"] for group in pc.parameter_groups(model, **options) for p in group["params"]}
    expected = {path: rates[id(p)] for path, p in model.named_parameters()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    names = {id(parameter): path for path, parameter in wrapped.named_parameters()}
    groups = pc.parameter_groups(wrapped, **options)
    trained = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sorted(trained) == sorted(path for path, p in wrapped.named_parameters() if p.requires_grad)
    assert all(".lora_" in path for path in trained)
    for path, group in trained.items():
        layer = path.removeprefix("base_model.model.").partition(".lora_")[0]
        assert group["lr"] == expected[f"{layer}.weight"]
        assert group["weight_decay"] == 0.1
