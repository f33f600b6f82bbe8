"""Models built without values or in another dtype, and converted back and forth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import perceiver_core as pc
from perceiver_core import positions
from tests.integration.whole_models import MODELS, drawn, encoder, make

pytestmark = pytest.mark.no_shape_checks
EXACT = {"rtol": 0, "atol": 0}


def gaussian() -> tuple[nn.Module, Tensor]:
    """A model with a buffer that no other module has: random frequencies."""
    torch.manual_seed(0)
    adapter = pc.adapters.Image(3, positions=positions.Gaussian(2, num_features=3, scale=10.0))
    return pc.Perceiver(adapter, encoder(adapter.dim), pc.heads.Classification(12, 3)), drawn(2, 3, 7, 5)


def build(name: str) -> nn.Module:
    return (gaussian() if name == "gaussian" else MODELS[name]())[0]


def trained(name: str) -> tuple[nn.Module, Any]:
    if name == "gaussian":
        model, inputs = gaussian()
        return model.eval(), inputs
    return make(name)


each_model = pytest.mark.parametrize("name", [*MODELS, "gaussian"])


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def emptied(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model = model.to_empty(device="cpu")
    with torch.no_grad():  # whatever the memory held before, so that nothing is right by chance
        for x in [*model.parameters(), *model.buffers()]:
            x.fill_(torch.nan) if x.is_floating_point() else x.zero_()
    model.load_state_dict(state)
    return model


def assigned(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
    return model


CONTEXTS = {"device": partial(torch.device, "meta"), "default": partial(default_device, "meta")}


@pytest.mark.parametrize("fill", [emptied, assigned])
@pytest.mark.parametrize("context", CONTEXTS)
@each_model
def test_models_built_on_the_meta_device(
    name: str, context: str, fill: Callable[[nn.Module, dict[str, Tensor]], nn.Module]
) -> None:
    """Nothing but the state dict is needed: no buffer or attribute keeps other values."""
    expected, inputs = trained(name)
    with CONTEXTS[context]():
        model = build(name)
    assert all(x.is_meta for x in [*model.parameters(), *model.buffers()])
    model = fill(model, expected.state_dict()).eval()
    assert not any(x.is_meta for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    torch.testing.assert_close(model(inputs), expected(inputs), **EXACT)


@each_model
def test_shapes_are_inferred_on_the_meta_device(name: str) -> None:
    expected, inputs = trained(name)
    model = copy.deepcopy(expected).to("meta")
    outputs = model(tree_map(lambda x: x.to("meta"), inputs))
    shapes = [tree_map(lambda x: (tuple(x.shape), x.dtype), value) for value in (outputs, expected(inputs))]
    assert shapes[0] == shapes[1]


def test_skip_init() -> None:
    """A model that takes a device is built without drawing weights, as PyTorch documents it."""

    class Classifier(nn.Module):
        def __init__(self, dim: int, *, device: Any = None) -> None:
            super().__init__()
            with torch.device(device or "cpu"):
                self.encoder = pc.Encoder(9, num_latents=5, dim=dim, depth=1, num_heads=2)

    state = torch.random.get_rng_state()
    model = nn.utils.skip_init(Classifier, 12)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = Classifier(12)
    model.load_state_dict(other.state_dict())
    x = drawn(2, 7, 9)
    torch.testing.assert_close(model.encoder(x), other.encoder(x), **EXACT)


def doubled(value: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


@each_model
def test_the_default_dtype(name: str) -> None:
    """Models are built in it and run in it, and agree with a float32 model of the same weights."""
    expected, inputs = trained(name)
    with default_dtype(torch.float64):
        model = build(name)
        assert {x.dtype for x in [*model.parameters(), *model.buffers()] if x.is_floating_point()} == {torch.float64}
        model.load_state_dict(expected.state_dict())
        actual = model.eval()(doubled(inputs))
    torch.testing.assert_close(actual, doubled(expected(inputs)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(expected).double()(doubled(inputs)), actual, rtol=1e-9, atol=1e-9)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@each_model
def test_half_precision_and_back(name: str, dtype: torch.dtype) -> None:
    """Nothing is rounded but parameters, and the statistics of batch norm."""
    model, inputs = trained(name)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for x in [*expected.parameters(), *(x for path, x in expected.named_buffers() if "running" in path)]:
            x.copy_(x.to(dtype))
    torch.testing.assert_close(model.to(dtype).float()(inputs), expected(inputs), **EXACT)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.to("cpu", torch.bfloat16),
    "inside": lambda module: nn.Sequential(module).to(torch.bfloat16)[0],
    "double": lambda module: module.double().bfloat16(),
    "empty": lambda module: assigned(module.to("meta", torch.bfloat16).to_empty(device="cpu"), STATE),
}
STATE = positions.Gaussian(2, num_features=32, scale=10.0).state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_random_frequencies_stay_in_single_precision(way: str) -> None:
    """In bfloat16, a frequency of 30 is rounded by up to 0.06, which is a tenth of a turn at the edge of an image."""
    where = positions.Gaussian(2, num_features=32, scale=10.0)
    where.load_state_dict(STATE)
    points = drawn(7, 2) * 2 - 1
    expected = where(points)
    low = WAYS[way](copy.deepcopy(where))
    assert low.frequencies.dtype == torch.float32
    torch.testing.assert_close(low(points), expected, **EXACT)
    half = low(points.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, where(points.bfloat16().float()).bfloat16(), **EXACT)


def test_random_frequencies_of_a_half_precision_default() -> None:
    with default_dtype(torch.bfloat16):
        where = positions.Gaussian(2)
    assert where.frequencies.dtype == torch.float32
    assert where.double().frequencies.dtype == torch.float64
    assert where.float().frequencies.dtype == torch.float32


@pytest.mark.parametrize(
    "where",
    [
        positions.Fourier(2, num_bands=64, max_resolution=224),
        positions.FourierPerAxis(2, max_frequency=224.0),
        positions.NeRF(2),
        positions.Gaussian(2),
    ],
    ids=lambda where: type(where).__name__,
)
@pytest.mark.parametrize("dtype", HALVES)
def test_features_of_a_half_precision_model_are_those_of_single_precision(where: nn.Module, dtype: torch.dtype) -> None:
    expected = [table.to(dtype) for table in where.tables((13, 17), like=torch.zeros(()))]
    low = copy.deepcopy(where).to(dtype)
    tables = low.tables((13, 17), like=torch.zeros((), dtype=dtype))
    torch.testing.assert_close(list(tables), expected, **EXACT)


def test_saved_in_half_precision(tmp_path: Any) -> None:
    model, inputs = gaussian()
    expected = model.adapter.positions(drawn(7, 2))
    again = pc.load(pc.save(model.bfloat16(), tmp_path))
    torch.testing.assert_close(again.adapter.positions(drawn(7, 2)), expected, **EXACT)
    torch.testing.assert_close(again(inputs.bfloat16()), model.eval()(inputs.bfloat16()), **EXACT)
