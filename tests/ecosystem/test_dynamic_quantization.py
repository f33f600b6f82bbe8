"""Models quantized by `torch.ao.quantization.quantize_dynamic`, called as PyTorch documents it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.ao.quantization import quantize_dynamic
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's own: quantize_dynamic is deprecated in favor of torchao
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # of torch.save of its state dict
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
]


def relative_error(actual: object, expected: object) -> float:
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


def with_rounded_weights(model: nn.Module, small: nn.Module) -> nn.Module:
    """Returns the model with the values that the quantized weights stand for, as plain tensors."""
    rounded = copy.deepcopy(model)
    for path, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            rounded.get_submodule(path).weight = nn.Parameter(layer.weight().dequantize())
    return rounded


@torch.no_grad()
@pytest.mark.parametrize("spec", [None, {nn.Linear}], ids=["default", "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_are_quantized(name: str, spec: set[type[nn.Module]] | None, tmp_path: Path) -> None:
    model, inputs = make(name)
    small = quantize_dynamic(model, spec, dtype=torch.qint8)
    layers = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {path for path, layer in small.named_modules() if isinstance(layer, QuantizedLinear)} == layers
    actual = small(inputs)
    assert relative_error(actual, with_rounded_weights(model, small)(inputs)) < 0.2  # activations are rounded too
    assert relative_error(actual, model(inputs)) > 1e-4
    with pytest.raises(ValueError, match=r"_packed_params\S* is not a tensor .* before it is quantized"):
        pc.save(small, tmp_path)
    assert list(tmp_path.iterdir()) == []


def image_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(2, num_bands=7, max_resolution=24))
    encoder = pc.Encoder(image.dim, num_latents=8, dim=32, num_reads=2, depth=1, num_heads=4)
    return pc.Perceiver(image, encoder, pc.heads.Classification(32, 5)).eval(), torch.rand(2, 3, 24, 32)


@torch.no_grad()
def test_reads_use_the_layers_and_explain_why() -> None:
    model, image = image_model()
    small = quantize_dynamic(model)
    for read in pc.explain_reads(small, image):
        assert read.strategy == pc.reads.Dense()
        assert "Structured cannot: the projection to keys or values is a" in read.why
    attention = small.encoder.attention_map(small.adapter(image))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 1, 8))
    pc.reads.set_strategy(small, pc.reads.Structured())
    with pytest.raises(ValueError, match=r"not a plain nn\.Linear"):
        small(image)


def test_generation_with_quantized_layers() -> None:
    model, ids = make("text")
    small = quantize_dynamic(model)
    # Activations are rounded with one scale for each call, so ids with and without a cache may differ.
    for use_cache in (True, False):
        found = pc.generate(small, ids[:, :5], max_new_tokens=4, use_cache=use_cache)
        assert found.shape == (2, 4) and found.min() >= 0 and found.max() < 11


def test_a_selection_of_layers(tmp_path: Path) -> None:
    """Only the latent transformers, so that structured reads stay possible."""
    model, image = image_model()
    pc.reads.set_strategy(model, pc.reads.Structured())
    names = {path for path, layer in model.named_modules() if type(layer) is nn.Linear and ".reads." not in path}
    small = quantize_dynamic(model, names)
    assert {path for path, layer in small.named_modules() if isinstance(layer, QuantizedLinear)} == names
    with torch.no_grad():
        assert 0 < relative_error(small(image), model(image)) < 0.05


def test_the_state_dict_is_saved_and_loaded(tmp_path: Path) -> None:
    """The float model is saved as usual, and the quantized weights by torch.save, then loaded into a new model."""
    model, image = image_model()
    small = quantize_dynamic(model)
    pc.save(model, tmp_path / "float")
    torch.save(small.state_dict(), tmp_path / "int8.pt")
    again = quantize_dynamic(pc.load(tmp_path / "float"))
    again.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True))
    assert torch.equal(again(image), small(image))
