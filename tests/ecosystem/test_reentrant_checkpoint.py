"""torch.utils.checkpoint around any part of any model: gradients are right, or PyTorch says why not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
NO_GRADIENTS = "None of the inputs have requires_grad=True"  # of tensors that PyTorch finds, which are not in `Tokens`
TWICE = "Trying to backward through the graph a second time"  # the graph of tokens that others use, too


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(inputs)
    sum(out.square().sum() for out in tree_leaves(outputs) if out.is_floating_point()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def recompute(module: nn.Module, *, reentrant: bool) -> None:
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda *args: forward(*args, **kwargs), *args, use_reentrant=reentrant)

    module.forward = call  # type: ignore[method-assign]


def parts(model: nn.Module, *, leaves: bool = False) -> list[tuple[str, nn.Module]]:
    modules = [(part, module) for part, module in model.named_modules() if not isinstance(module, CONTAINERS)]
    return [(part, module) for part, module in modules if leaves or [*module.children()]]


@pytest.mark.parametrize("name", MODELS)
def test_every_part(name: str) -> None:
    """One part at a time, and all with the layers in them at once. `pc.checkpoint_activations` uses this form."""
    model, inputs = make(name)
    expected = gradients(model, inputs)
    for _, module in parts(model):
        recompute(module, reentrant=False)
        torch.testing.assert_close(gradients(model, inputs), expected, **CLOSE)
        del module.forward
    for _, module in parts(model, leaves=True):
        recompute(module, reentrant=False)
    torch.testing.assert_close(gradients(model, inputs), expected, **CLOSE)


@pytest.mark.parametrize("name", ["image", "gated", "inputs_per_read", "flow", "multimodal", "text", "frames"])
def test_every_part_by_the_reentrant_form(name: str) -> None:
    """It finds gradients of tensors that are arguments or in a tuple that is returned, not those in other objects."""
    model, inputs = make(name)
    expected = gradients(model, inputs)
    refused = []
    for part, module in parts(model):
        if (name, part) == ("multimodal", "decoder"):
            continue  # returns a dictionary; see below
        recompute(module, reentrant=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.testing.assert_close(gradients(model, inputs), expected, **CLOSE)
        except (UserWarning, RuntimeError) as problem:
            assert NO_GRADIENTS in str(problem) or TWICE in str(problem)
            refused.append(part)
        del module.forward
    blocks = [part for part in refused if ".blocks." in part or "transformers" in part.split(".")[-2:]]
    assert [part for part in blocks if "aggregates" not in part] == []


def test_tokens_of_an_adapter_in_the_reentrant_form_are_refused() -> None:
    """Their gradients would be lost without a word. The form returns a plain tuple, which is not `Tokens`."""
    model, inputs = make("projected")
    recompute(model.adapter, reentrant=True)
    with pytest.raises(ValueError, match="inputs must be one for all reads; got 4"):
        model(inputs.requires_grad_())


def test_the_reentrant_form_loses_gradients_of_dictionaries() -> None:
    """PyTorch's limitation, with any module."""

    class Named(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"x": super().forward(x)}

    x, module = torch.ones(1, 2, requires_grad=True), Named(2, 2)
    assert not checkpoint(module, x, use_reentrant=True)["x"].requires_grad
    assert checkpoint(module, x, use_reentrant=False)["x"].requires_grad
