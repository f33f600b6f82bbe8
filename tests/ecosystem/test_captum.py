"""captum: attribution to inputs, and to layers between which `Tokens` pass."""

from __future__ import annotations

import pytest
import torch
from captum.attr import (
    DeepLift,
    FeatureAblation,
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    Occlusion,
    Saliency,
)
from torch import Tensor

from tests.integration.whole_models import make

pytestmark = [
    pytest.mark.no_shape_checks,
    # captum's and PyTorch's own
    pytest.mark.filterwarnings("ignore:Setting (forward|backward).*hooks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning"),
]
TARGET = 1
LAYERS = ("adapter.stem", "encoder", "encoder.reads.0", "encoder.reads.1", "encoder.transformers.0", "head.norm")


def model_and_images() -> tuple[torch.nn.Module, Tensor]:
    return make("image")


def test_saliency_is_the_gradient() -> None:
    model, images = model_and_images()
    actual = Saliency(model).attribute(images.clone().requires_grad_(), target=TARGET)
    x = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, TARGET].sum(), x)
    torch.testing.assert_close(actual, expected.abs())


def test_integrated_gradients_sum_to_the_difference_of_outputs() -> None:
    model, images = model_and_images()
    attributions = IntegratedGradients(model).attribute(images, target=TARGET, n_steps=100)
    difference = (model(images) - model(torch.zeros_like(images)))[:, TARGET]
    torch.testing.assert_close(attributions.flatten(1).sum(1), difference, rtol=0, atol=1e-2)


def test_feature_ablation_and_occlusion() -> None:
    model, images = model_and_images()
    rows = torch.arange(8).reshape(1, 1, 8, 1).expand(1, 3, 8, 10)
    attributions = FeatureAblation(model).attribute(images, target=TARGET, feature_mask=rows)
    without = images.clone()
    without[:, :, 3] = 0
    expected = (model(images) - model(without))[:, TARGET]
    torch.testing.assert_close(attributions[:, 0, 3, 0], expected, rtol=1e-4, atol=1e-5)
    occluded = Occlusion(model).attribute(images, target=TARGET, sliding_window_shapes=(3, 8, 10))
    torch.testing.assert_close(occluded[:, 0, 0, 0], (model(images) - model(images * 0))[:, TARGET])


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str) -> None:
    model, images = model_and_images()
    part, seen = model.get_submodule(layer), []
    part.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(images)
    activation = LayerActivation(model, part).attribute(images)
    activation = activation[-1] if isinstance(activation, list) else activation
    assert any(torch.allclose(activation, state, rtol=1e-4, atol=1e-5) for state in seen)
    expected = (model(images) - model(torch.zeros_like(images)))[:, TARGET]
    conductance = LayerConductance(model, part).attribute(images, target=TARGET, n_steps=50)
    integrated = LayerIntegratedGradients(model, part).attribute(images, target=TARGET, n_steps=50)
    assert LayerGradCam(model, part).attribute(images, target=TARGET).isfinite().all()
    assert conductance.shape == integrated.shape == activation.shape
    if layer in ("adapter.stem", "encoder", "head.norm"):  # called once, and all that passes goes through them
        for attributions in (conductance, integrated):
            torch.testing.assert_close(attributions.flatten(1).sum(1), expected, rtol=0.1, atol=0.1)


def test_a_layer_that_returns_tokens_is_refused() -> None:
    """captum takes layers that return tensors or tuples of nothing else; choose the stem of an adapter or a read."""
    model, images = model_and_images()
    with pytest.raises((AttributeError, AssertionError)):
        LayerActivation(model, model.adapter).attribute(images)


def test_deep_lift_is_inexact() -> None:
    """It runs, but its rules are for activations that are modules; those of softmax and norms are plain gradients."""
    model, images = model_and_images()
    attributions = DeepLift(model).attribute(images, torch.zeros_like(images), target=TARGET)
    difference = (model(images) - model(torch.zeros_like(images)))[:, TARGET]
    assert attributions.shape == images.shape
    assert not torch.allclose(attributions.flatten(1).sum(1), difference, atol=1e-2)
