"""Models under torch.func, as they come: the default kernel, and the reads that it chooses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import kernels, reads
from tests.integration.whole_models import DIM, MODELS, drawn, encoder, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's own: operators without a rule for vmap, which it calls once for each sample
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
READS = {"auto": None, "factored": reads.Factored(), "structured": reads.Structured()}
each_model = pytest.mark.parametrize("name", MODELS)
Weights = dict[str, Tensor]


def loss_of(model: nn.Module) -> Any:
    buffers = dict(model.named_buffers())

    def loss(weights: Weights, inputs: Any) -> Tensor:
        outputs = functional_call(model, (weights, buffers), (inputs,))
        return sum(x.square().mean() for x in tree_leaves(outputs))

    return loss


def weights_of(model: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@each_model
def test_functional_call_replaces_every_weight(name: str) -> None:
    """Nothing is computed from the weights of the module itself; tied weights are replaced together."""
    model, inputs = make(name)
    other = {name: parameter * 1.1 for name, parameter in weights_of(model).items()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(other, strict=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.testing.assert_close(functional_call(model, other, (inputs,)), expected(inputs), rtol=1e-5, atol=1e-6)
    again = functional_call(expected, {}, (inputs,), tie_weights=False)
    torch.testing.assert_close(again, expected(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", READS)
@pytest.mark.parametrize("name", ["image", "multimodal", "flow"])
def test_per_sample_gradients_of_reads(name: str, strategy: str) -> None:
    check_per_sample_gradients(*make(name, READS[strategy]))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("image", "multimodal", "flow")])
def test_per_sample_gradients(name: str) -> None:
    check_per_sample_gradients(*make(name))


def check_per_sample_gradients(model: nn.Module, inputs: Any) -> None:
    loss, weights = loss_of(model), weights_of(model)
    each = vmap(grad(loss), in_dims=(None, 0))(weights, tree_map(lambda x: x.unsqueeze(1), inputs))
    for i in range(2):
        alone = copy.deepcopy(model)
        loss(dict(alone.named_parameters()), tree_map(lambda x, i=i: x[i : i + 1], inputs)).backward()
        expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in alone.named_parameters()}
        torch.testing.assert_close({name: gradient[i] for name, gradient in each.items()}, expected, **CLOSE)


@each_model
def test_ensembles(name: str) -> None:
    models = [make(name)[0] for _ in range(3)]
    inputs = make(name)[1]
    for factor, model in enumerate(models, start=1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.05 * factor)
    weights, buffers = stack_module_state(models)
    outputs = vmap(lambda w, b: functional_call(models[0], (w, b), (inputs,)))(weights, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(tree_map(lambda x, i=i: x[i], outputs), model(inputs), **CLOSE)


def test_ensembles_that_drop() -> None:
    """Each member draws its own mask if vmap is told to."""
    image = pc.adapters.Image(3, positions=None)
    models = [
        pc.Perceiver(image, encoder(3, latent_transformer=lambda *a, **o: nn.Dropout(0.5)), pc.heads.Identity())
        for _ in range(2)
    ]
    weights, buffers = stack_module_state(models)
    weights = {name: weight[:1].expand_as(weight) for name, weight in weights.items()}
    x = drawn(2, 3, 4, 5)
    first, second = vmap(lambda w, b: functional_call(models[0], (w, b), (x,)), randomness="different")(
        weights, buffers
    )
    assert not torch.equal(first, second)


def doubled(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    return model.double(), tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)


@pytest.mark.parametrize("strategy", ["auto", "factored"])
@each_model
def test_forward_mode_equals_reverse_mode(name: str, strategy: str) -> None:
    if strategy == "factored" and not isinstance(make(name)[0], (pc.Perceiver, pc.PerceiverIO)):
        return
    model, inputs = doubled(*make(name, READS[strategy]))
    loss, weights = loss_of(model), weights_of(model)
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}
    _, slope = jvp(lambda weights: loss(weights, inputs), (weights,), (direction,))
    _, pull = vjp(lambda weights: loss(weights, inputs), weights)
    gradient = pull(torch.ones_like(slope))[0]
    torch.testing.assert_close(slope, sum((gradient[name] * direction[name]).sum() for name in weights))


@each_model
def test_second_derivatives_in_both_orders(name: str) -> None:
    """Forward over reverse, reverse over reverse, and finite differences of the gradient."""
    model, inputs = doubled(*make(name))
    loss, weights = loss_of(model), weights_of(model)
    torch.manual_seed(0)
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def gradient(weights: Weights) -> Weights:
        return grad(loss)(weights, inputs)

    def along(weights: Weights) -> Tensor:
        return sum((g * direction[name]).sum() for name, g in gradient(weights).items())

    forward = jvp(gradient, (weights,), (direction,))[1]
    torch.testing.assert_close(grad(along)(weights), forward)
    step = 1e-6
    after, before = ({n: w + sign * step * direction[n] for n, w in weights.items()} for sign in (1, -1))
    later, earlier = gradient(after), gradient(before)
    differences = {n: (later[n] - earlier[n]) / (2 * step) for n in weights}
    torch.testing.assert_close(forward, differences, rtol=1e-4, atol=1e-5)


def test_jacobians_and_hessians_of_inputs() -> None:
    model, x = doubled(*make("image"))
    x = x[:1, :, :4, :4]
    torch.testing.assert_close(jacfwd(model)(x), jacrev(model)(x))
    second = hessian(lambda x: model(x).sum())(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(second, second.mT)
    explicit = torch.autograd.functional.hessian(lambda x: reference_of(model)(x).sum(), x)
    torch.testing.assert_close(second, explicit.reshape(x.numel(), x.numel()))


def reference_of(model: nn.Module) -> nn.Module:
    """Returns the model with the kernel that is differentiable any number of times."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, pc.MultiHeadAttention):
            module.kernel = kernels.reference
    return model


def test_hessians_for_each_sample() -> None:
    model, x = doubled(*make("image"))
    each = vmap(hessian(lambda x: model(x[None]).sum()))(x[..., :4, :4])
    for i in range(2):
        alone = hessian(lambda x: model(x[None]).sum())(x[i, :, :4, :4])
        torch.testing.assert_close(each[i], alone)


def large_image() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(2, num_bands=4, max_resolution=24))
    return pc.Perceiver(image, encoder(image.dim, num_reads=1), pc.heads.Classification(DIM, 3)), drawn(2, 3, 24, 32)


def test_automatic_reads_are_not_structured_where_more_derivatives_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads.Structured, "cost", lambda *_: reads.Cost(0.0, 0.0, 0.0))  # always the cheapest
    model, x = large_image()
    chosen: list[str] = []

    def noted(context: reads.ReadContext) -> None:
        chosen.append(type(context.source.strategy.choose(context).strategy).__name__)

    with reads.strategy.listening(noted):
        model(x)
        grad(lambda x: model(x).sum())(x)
        assert chosen == ["Structured", "Structured"]
        _, slope = jvp(model, (x,), (x,))
        _, curvature = jvp(grad(lambda x: model(x).sum()), (x,), (x,))
    assert chosen[2:] == ["Factored", "Factored"] or "Structured" not in chosen[2:]
    step = 1e-3
    torch.testing.assert_close(slope, (model(x + step * x) - model(x - step * x)) / (2 * step), rtol=1e-2, atol=1e-3)
    assert curvature.isfinite().all()
    reads.set_strategy(model, reads.Structured())
    with pytest.raises(ValueError, match="structured reads support neither forward-mode AD nor second derivatives"):
        jvp(model, (x,), (x,))


@pytest.mark.parametrize("strategy", [reads.Factored(), reads.Structured()], ids=["factored", "structured"])
def test_reads_of_several_slabs(strategy: reads.Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that recompute slabs in the backward pass read all tokens at once, as torch.func requires."""
    monkeypatch.setattr(reads.slabs, "TOKENS", 100)
    model, x = large_image()
    reads.set_strategy(model, strategy)
    expected = torch.autograd.functional.vjp(lambda x: model(x).sum(), x)[1]
    torch.testing.assert_close(grad(lambda x: model(x).sum())(x), expected, rtol=1e-3, atol=1e-5)
    each = vmap(grad(lambda x: model(x[None]).sum()))(x)
    torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-5)


def test_second_derivatives_without_torch_func_need_another_kernel() -> None:
    """PyTorch's fused kernel has no second derivative, and does not see in the first pass that one will be taken."""
    model, x = make("image")
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        slope.square().sum().backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (actual,) = torch.autograd.grad(slope.square().sum(), x)
    (slope,) = torch.autograd.grad(reference_of(model)(x).sum(), x, create_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(slope.square().sum(), x)[0], **CLOSE)
