"""Opacus: training with differential privacy, by per-sample gradients of torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, TensorDataset

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's own, of its attention kernel on the CPU under vmap
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    # Opacus's own: it draws noise with a generator that is not cryptographic, and advises against a fixed alpha
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning"),
]
BATCH_NORM = ("gated", "padded_stem")
DATA_DEPENDENT = ("multimodal",)  # its table checks its values, which torch.func cannot


def loss_of(outputs: Any) -> Tensor:
    return sum(out.square().sum() for out in tree_leaves(outputs))


def per_sample_gradients(model: nn.Module, inputs: Any, loss: Any = lambda out: loss_of(out)) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def of_one(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        batch = tree_map(lambda x: x.unsqueeze(0), sample)
        return loss(functional_call(model, parameters, (batch,)))

    return vmap(grad(of_one), in_dims=(None, 0), randomness="different")(parameters, inputs)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in DATA_DEPENDENT])
def test_per_sample_gradients_equal_a_loop(name: str) -> None:
    model, inputs = make(name)
    actual = per_sample_gradients(model, inputs)
    for i in range(2):
        model.zero_grad()
        loss_of(model(tree_map(lambda x, i=i: x[i : i + 1], inputs))).backward()
        expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close({key: actual[key][i] for key in expected}, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_only_batch_norm_is_not_valid(name: str) -> None:
    model, _ = make(name)
    problems = [str(problem) for problem in ModuleValidator.validate(model.train(), strict=False)]
    assert all("BatchNorm" in problem for problem in problems) and bool(problems) == (name in BATCH_NORM)


def test_a_private_training_step() -> None:
    """`grad_sample_mode="no_op"`: Opacus clips and adds noise, and the user sets `grad_sample`."""
    model, images = make("image")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(images), batch_size=2)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=0.01,
        poisson_sampling=False,
        grad_sample_mode="no_op",
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = per_sample_gradients(model, images)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    for name, parameter in model.named_parameters():
        parameter.grad_sample = gradients[name]
    optimizer.step()
    for name, parameter in model.named_parameters():
        clipped = torch.einsum("b...,b->...", gradients[name], (0.01 / norms).clamp(max=1)) / 2
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * clipped, rtol=1e-3, atol=1e-6)
    assert private is not None


def test_opacus_hooks_take_tensors_only() -> None:
    """Opacus's default keeps the inputs of each module that has parameters of its own: of an encoder, `Tokens`."""
    model, images = make("image")
    with pytest.raises(AttributeError, match="has no attribute 'detach'"):
        GradSampleModule(model.train(), strict=False)(images)


def test_parts_with_tensors_work_with_the_hooks_of_opacus() -> None:
    """A stack of self-attention blocks, of plain linear layers and norms."""
    torch.manual_seed(0)
    transformer, x = pc.LatentTransformer(12, depth=2, num_heads=2), torch.rand(3, 5, 12)
    expected = per_sample_gradients(transformer, x)
    hooked = GradSampleModule(transformer, loss_reduction="sum", strict=False)
    loss_of(hooked(x)).backward()
    actual = {name: parameter.grad_sample for name, parameter in transformer.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
