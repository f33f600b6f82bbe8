"""Models quantized by torchao: outputs, reads, what is saved, and quantization-aware training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    quantize_,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),  # its own use of older names
]
CONFIGS = {  # with the largest error that is allowed, relative to the output of the model with the rounded weights
    "int8 weights": (Int8WeightOnlyConfig, 1e-5),
    "float8 weights": (Float8WeightOnlyConfig, 1e-5),
    "int4 weights": (partial(IntxWeightOnlyConfig, torch.int4, granularity=PerAxis(0)), 1e-5),
    "int8 weights and activations": (Int8DynamicActivationInt8WeightConfig, 0.1),  # activations are rounded too
}


def relative_error(actual: object, expected: object) -> float:
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


def quantized(model: nn.Module, config: object) -> nn.Module:
    quantize_(model := copy.deepcopy(model), config)
    return model


def with_rounded_weights(model: nn.Module, small: nn.Module) -> nn.Module:
    """Returns the model with the values that the quantized weights stand for, as plain tensors."""
    rounded = copy.deepcopy(model)
    for path, layer in small.named_modules():
        if isinstance(layer, nn.Linear) and not is_plain(layer.weight):
            rounded.get_submodule(path).weight = nn.Parameter(layer.weight.dequantize())
    return rounded


def image_model(strategy: pc.reads.Strategy | None = None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(2, num_bands=7, max_resolution=24))  # 33 wide
    encoder = pc.Encoder(image.dim, num_latents=8, dim=32, num_reads=2, depth=1, num_heads=4)
    model = pc.Perceiver(image, encoder, pc.heads.Classification(32, 5)).eval()
    if strategy is not None:
        pc.reads.set_strategy(model, strategy)
    return model, torch.rand(2, 3, 24, 32)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_are_quantized(name: str, config: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    make_config, tolerance = CONFIGS[config]
    small = quantized(model, make_config())
    plain = [path for path, layer in small.named_modules() if isinstance(layer, nn.Linear) and is_plain(layer.weight)]
    assert plain == []
    actual = small(inputs)
    assert relative_error(actual, with_rounded_weights(model, small)(inputs)) < tolerance
    assert relative_error(actual, model(inputs)) > 1e-4
    with pytest.raises(ValueError, match=r"weight is a \w+Tensor, a tensor that has no values itself"):
        pc.save(small, tmp_path)
    assert list(tmp_path.iterdir()) == []


def is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor


@torch.no_grad()
def test_reads_use_the_layers_and_explain_why() -> None:
    model, image = image_model()
    with_structure, _ = image_model(pc.reads.Structured())
    small = quantized(model, Int8WeightOnlyConfig())
    assert relative_error(small(image), with_rounded_weights(with_structure, small)(image)) < 1e-4
    for read in pc.explain_reads(small, image):
        assert read.strategy == pc.reads.Dense()
        for strategy in ("Structured", "Factored"):
            assert f"{strategy} cannot: a weight of the norm or of a projection is a Int8Tensor" in read.why
    forced = quantized(with_structure, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="a Int8Tensor, not a plain tensor"):
        forced(image)


@torch.no_grad()
def test_structured_reads_of_a_model_with_quantized_blocks_only() -> None:
    """A filter leaves the projections of the reads as they are, as the docs page recommends for large inputs."""
    model, image = image_model(pc.reads.Structured())
    quantize_(
        small := copy.deepcopy(model),
        Int8WeightOnlyConfig(),
        filter_fn=lambda layer, path: isinstance(layer, nn.Linear) and ".reads." not in path,
    )
    assert relative_error(small(image), with_rounded_weights(model, small)(image)) < 1e-4
    assert not torch.equal(small(image), model(image))


def test_the_state_dict_is_saved_and_loaded(tmp_path: Path) -> None:
    """The float model is saved as usual, and the quantized weights by torch.save, then assigned to a new model."""
    model, image = image_model()
    pc.save(model, tmp_path / "float")
    small = quantized(model, Int8WeightOnlyConfig())
    torch.save(small.state_dict(), tmp_path / "int8.pt")
    again = pc.load(tmp_path / "float")
    again.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True), assign=True)
    assert torch.equal(again(image), small(image))
    restored = quantized(pc.load(tmp_path / "float"), Int8WeightOnlyConfig())  # quantization is deterministic
    assert torch.equal(restored(image), small(image))


@torch.no_grad()
def test_batches_of_no_samples() -> None:
    """With quantized weights they pass; with quantized activations, torchao fails, as it does for any nn.Linear."""
    model, image = image_model()
    assert quantized(model, Int8WeightOnlyConfig())(image[:0]).shape == (0, 5)
    for module, inputs in ((nn.Sequential(nn.Linear(32, 32)), torch.zeros(0, 32)), (model, image[:0])):
        with pytest.raises(TypeError, match="unsupported operand"):
            quantized(module, Int8DynamicActivationInt8WeightConfig())(inputs)


def test_whole_quantized_modules_are_not_pickled() -> None:
    """The fault is torchao's: it replaces extra_repr by a bound partial, which no module can be pickled with."""
    import pickle

    layer = quantized(nn.Sequential(nn.Linear(32, 32)), Int8WeightOnlyConfig())
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        pickle.dumps(layer)


@pytest.mark.parametrize(
    "build", [image_model, lambda: make("text"), lambda: make("flow")], ids=["image", "text", "io"]
)
def test_quantization_aware_training(build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """The fake-quantized model computes what the quantized one does, trains, and becomes a plain model again."""
    model, inputs = build()
    twin = copy.deepcopy(model)
    weights = IntxFakeQuantizeConfig(torch.int8, granularity=PerAxis(0))
    quantize_(model, QATConfig(weight_config=weights, step="prepare"))
    expected = quantized(twin, IntxWeightOnlyConfig(torch.int8, granularity=PerAxis(0)))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected(inputs), rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss = sum(out.square().mean() for out in tree_leaves(model(inputs)))
    loss.backward()
    used = {path: p.grad is not None for path, p in model.named_parameters()}
    assert all(used.values()), [path for path, value in used.items() if not value]
    optimizer.step()
    with torch.no_grad():
        after = sum(out.square().mean() for out in tree_leaves(model(inputs)))
    assert after < loss.detach()
    quantize_(model, QATConfig(step="convert"))
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
