"""Models pruned by torch.nn.utils.prune: outputs, reads, gradients, and what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks
EXACT = {"rtol": 0, "atol": 0}


def linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(layer, "weight") for layer in model.modules() if isinstance(layer, nn.Linear)]


def each(method: Callable[..., Any], **options: Any) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        for layer, name in linears(model):
            method(layer, name, amount=0.4, **options)

    return apply


def together(model: nn.Module) -> None:
    prune.global_unstructured(linears(model), prune.L1Unstructured, amount=0.4)


METHODS = {
    "l1": each(prune.l1_unstructured),
    "random": each(prune.random_unstructured),
    "rows": each(prune.ln_structured, n=2, dim=0),
    "columns": each(prune.ln_structured, n=2, dim=1),
    "global": together,
}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "global") for name in MODELS] + [("flow", method) for method in METHODS if method != "global"],
)
def test_pruned_models_compute_with_the_masked_weights(name: str, method: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    expected = copy.deepcopy(model)
    torch.manual_seed(1)
    METHODS[method](model)
    for (layer, _), (plain, _) in zip(linears(model), linears(expected), strict=True):
        plain.weight.data.mul_(layer.weight_mask)
    zeros = sum(int((layer.weight == 0).sum()) for layer, _ in linears(model))
    assert zeros > 0.3 * sum(layer.weight.numel() for layer, _ in linears(model))
    torch.testing.assert_close(model(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"computes weight from other tensors.* torch\.nn\.utils\.prune\.remove"):
        pc.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for layer, weight in linears(model):
        prune.remove(layer, weight)
    again = pc.load(pc.save(model, tmp_path))
    torch.testing.assert_close(again(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
    assert sum(int((layer.weight == 0).sum()) for layer, _ in linears(again)) == zeros


def test_biases_norms_latents_and_tables_are_pruned(tmp_path: Path) -> None:
    model, inputs = make("image")
    parameters = [
        (module, name) for module in model.modules() for name, parameter in module.named_parameters(recurse=False)
    ]
    expected = copy.deepcopy(model)
    torch.manual_seed(1)
    for module, name in parameters:
        prune.random_unstructured(module, name, amount=0.5)
    masks = {
        f"{path}.{name.removesuffix('_mask')}".lstrip("."): mask
        for path, module in model.named_modules()
        for name, mask in module.named_buffers(recurse=False)
        if name.endswith("_mask")
    }
    assert masks.keys() == dict(expected.named_parameters()).keys()
    with torch.no_grad():
        for path, parameter in expected.named_parameters():
            parameter.mul_(masks[path])
    torch.testing.assert_close(model(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
    for module, name in parameters:
        prune.remove(module, name)
    torch.testing.assert_close(pc.load(pc.save(model, tmp_path))(inputs), model(inputs), **EXACT)


@pytest.mark.parametrize("strategy", [None, pc.reads.Dense(), pc.reads.Factored(), pc.reads.Structured()], ids=repr)
def test_reads_of_pruned_and_of_thinned_models(strategy: pc.reads.Strategy | None) -> None:
    """While pruning hooks are there, reads call the layers; after `remove`, each strategy reads the sparse weights."""
    model, inputs = make("image", strategy)
    METHODS["l1"](model)
    expected, _ = make("image", pc.reads.Dense())
    METHODS["l1"](expected)
    if strategy in (None, pc.reads.Dense()):
        torch.testing.assert_close(model(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
        for read in pc.explain_reads(model, inputs):
            assert "Structured cannot: the norm or a projection to keys or values has a hook" in read.why
    else:
        with pytest.raises(ValueError, match="has a hook, which expects it to be called"):
            model(inputs)
    for layer, name in linears(model):
        prune.remove(layer, name)
    torch.testing.assert_close(model(inputs), expected(inputs), rtol=1e-4, atol=1e-5)


def test_pruned_weights_stay_zero_in_training() -> None:
    model, inputs = make("image")
    METHODS["global"](model.train())
    masks = {path: buffer for path, buffer in model.named_buffers() if path.endswith("weight_mask")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = model(inputs).detach()
    for _ in range(3):
        optimizer.zero_grad()
        sum(out.square().mean() for out in tree_leaves(model(inputs))).backward()
        optimizer.step()
    changed: Tensor = model(inputs).detach() - before
    assert changed.abs().max() > 1e-3
    for layer, name in linears(model):
        prune.remove(layer, name)
    for path, mask in masks.items():
        assert not model.get_parameter(path.removesuffix("_mask"))[mask == 0].any()
