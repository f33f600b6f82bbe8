"""torchinfo: layers, shapes and numbers of parameters of every model."""

from __future__ import annotations

import pytest
import torch
import torchinfo
from torch import nn

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks
# torchinfo counts a weight that two modules own once per module, in models of plain PyTorch layers too (below).
TIED_WEIGHTS = ("text",)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_once(name: str) -> None:
    """Reads and transformers that several steps share, too."""
    model, inputs = make(name)
    summary = torchinfo.summary(model, input_data=(inputs,), depth=9, verbose=0)
    tied = model.head.vectors.numel() if name in TIED_WEIGHTS else 0
    assert summary.total_params == size(model) + tied
    assert summary.total_mult_adds > 0
    called = {layer.class_name for layer in summary.summary_list}
    assert {type(part).__name__ for part in model.children()} <= called


def test_torchinfo_counts_tied_weights_of_plain_layers_twice() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert torchinfo.summary(model, (2, 3), verbose=0).total_params == 2 * size(model) == 18


def test_shapes_of_tokens_and_latents() -> None:
    model, inputs = make("image")
    layers = torchinfo.summary(model, input_data=inputs, verbose=0).summary_list
    sizes = {layer.var_name: layer.output_size for layer in layers if layer.depth == 1}
    assert sizes == {"adapter": [2, 4, 5, 12], "encoder": [2, 5, 12], "head": [2, 3]}


def test_from_the_size_of_the_input() -> None:
    model, inputs = make("image")
    summary = torchinfo.summary(model, input_size=tuple(inputs.shape), depth=1, verbose=0)
    assert summary.total_params == size(model)
    table = str(summary)
    assert "Encoder" in table and "CrossAttend" not in table


def test_outputs_are_unchanged() -> None:
    """torchinfo's hooks make structured reads dense while it runs, and are removed afterwards."""
    model, inputs = make("image", pc.reads.Structured())
    expected = model(inputs)
    with pytest.raises(RuntimeError, match="Failed to run torchinfo") as caught:
        torchinfo.summary(model, input_data=inputs, verbose=0)
    assert "has a hook" in str(caught.value.__cause__)
    pc.reads.set_strategy(model, pc.reads.Auto())
    torchinfo.summary(model, input_data=inputs, verbose=0)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
