"""Models under wrappers that attach to the calls of modules: sharding, offloading, hooks.

Replicas are tested in tests/ecosystem/test_data_parallel.py, and real sharding in the files beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from perceiver_core import Tokens, reads
from perceiver_core.reads import KeysValues, SharedMemory
from perceiver_core.registry import names
from tests.integration.whole_models import MODELS, make

EXACT = {"rtol": 0, "atol": 0}
STRATEGIES = {"dense": reads.Dense(), "factored": reads.Factored(), "structured": reads.Structured()}
each_model = pytest.mark.parametrize("name", MODELS)
READS_TENSORS = (
    "text",
    "byte_text",
    "frames",
    "all_frames",
    "hierarchical",
)  # in which content and positions are mixed
each_strategy = pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(name, strategy, id=f"{name}, {word}")
        for name in MODELS
        for word, strategy in STRATEGIES.items()
        if word == "dense" or name not in READS_TENSORS
    ],
)


# Modules call modules


@contextmanager
def checked_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch, harmless: tuple[str, ...] = ()) -> Iterator[None]:
    """Raises if a method of a module is called from outside of its `__call__`, or its forward by anything else.

    Args:
        model: Model whose modules are checked; methods of `nn.Module` are not.
        monkeypatch: Restores the classes.
        harmless: Names of methods that use no weights, and may be called from outside.
    """
    called: list[nn.Module] = []  # the modules that run, from the outermost to the innermost
    asked: list[nn.Module] = []  # those whose harmless methods run
    original = nn.Module.__call__

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with pushed(called, self):
            return original(self, *args, **kwargs)

    def checked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if method.__name__ in harmless:
                with pushed(asked, self):
                    return method(self, *args, **kwargs)
            inside = called[-1:] if method.__name__ == "forward" else [*called, *asked]
            message = f"{type(self).__name__}.{method.__name__} was called from outside"
            assert any(module is self for module in inside), message
            return method(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", recorded)
        for part in {base for module in model.modules() for base in type(module).__mro__ if base not in BASES}:
            for name, method in list(vars(part).items()):
                if inspect.isfunction(method) and not name.startswith("__"):
                    patch.setattr(part, name, checked(method))
        yield


@contextmanager
def pushed(stack: list[nn.Module], module: nn.Module) -> Iterator[None]:
    stack.append(module)
    try:
        yield
    finally:
        stack.pop()


BASES = (*nn.Module.__mro__, nn.ModuleList, nn.ModuleDict, nn.ParameterDict, nn.Sequential)


@pytest.mark.parametrize("training", [False, True])
@each_model
def test_parents_call_their_children_only(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions return their tables, and queries their grid, without weights or by a call of themselves."""
    model, inputs = make(name)
    model.train(training)
    expected = model(inputs)
    with checked_calls(model, monkeypatch, harmless=("tables", "grid_of")):
        torch.testing.assert_close(model(inputs), expected, **EXACT)


def test_the_check_detects_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = pc.CrossAttend(4, 5)

        def forward(self, x: Tensor, *, method: str) -> object:
            return (
                getattr(self.read, method)(x, torch.zeros(1, 2, 5))
                if method == "forward"
                else self.read.read_context(torch.zeros(1, 2, 5))
            )

    model = Parent()
    for method in ("forward", "read_context"):
        with checked_calls(model, monkeypatch), pytest.raises(AssertionError, match=f"CrossAttend.{method} was called"):
            model(torch.zeros(1, 3, 4), method=method)


# Weights in the forward pass of a module that contains them

UNITS = (pc.MultiHeadAttention, pc.CrossAttend, pc.SelfAttend, pc.JointAttend, pc.LatentTransformer, pc.Encoder)


def gather_in_forward(model: nn.Module, units: tuple[type[nn.Module], ...]) -> None:
    """Makes weights NaN outside of the forward pass of the innermost unit around them, as sharding frees them."""
    whole = [module for module in model.modules() if module is model or isinstance(module, units)]
    owners = {id(parameter): unit for unit in whole for parameter in unit.parameters()}  # inner units come later
    for unit in whole:
        own = [(p, p.detach().clone()) for p in unit.parameters() if owners[id(p)] is unit]

        def gather(*_: object, own: list[tuple[Tensor, Tensor]] = own) -> None:
            for parameter, value in own:
                parameter.data.copy_(value)

        def free(*_: object, own: list[tuple[Tensor, Tensor]] = own) -> None:
            for parameter, _ in own:
                parameter.data.fill_(torch.nan)

        unit.register_forward_pre_hook(gather)
        unit.register_forward_hook(free)
        free()


@torch.no_grad()
@each_strategy
def test_weights_are_used_in_the_forward_pass_of_their_unit(name: str, strategy: reads.Strategy) -> None:
    model, inputs = make(name, strategy)
    expected = model(inputs)
    gather_in_forward(model, UNITS)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    torch.testing.assert_close(model(inputs), expected, **EXACT)


def offload(model: nn.Module) -> None:
    """Keeps weights on the meta device, and loads them while the module that owns them runs, as accelerate does."""
    for module in list(model.modules()):
        weights = [(module, name, w) for name, w in module._parameters.items() if w is not None]
        if weights:
            module.forward = loading(module.forward, weights)  # type: ignore[method-assign]
            unload(weights)


Weight = tuple[nn.Module, str, nn.Parameter]


def unload(weights: list[Weight]) -> None:
    for owner, name, weight in weights:
        owner._parameters[name] = nn.Parameter(weight.detach().to("meta"))


def loading(forward: Callable[..., Any], weights: list[Weight]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for owner, name, weight in weights:
            owner._parameters[name] = weight
        try:
            return forward(*args, **kwargs)
        finally:
            unload(weights)

    return call


@torch.no_grad()
@each_model
def test_offloaded_weights_on_the_meta_device(name: str) -> None:
    """Inputs are not compared with weights that are on no real device."""
    model, inputs = make(name)
    expected = model(inputs)
    offload(model)
    assert {weight.device.type for weight in model.parameters()} <= {"meta"}
    # Norms and projections whose forward was replaced are called, so reads are dense.
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)


# Parameters stay inside


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tokens):
        value = [value.content, value.position_tables, value.mask, value.modalities]
    if isinstance(value, (SharedMemory, KeysValues)):
        value = list(value) if isinstance(value, KeysValues) else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def returned_parameters(call: Callable[[], object]) -> tuple[set[type[nn.Module]], list[str]]:
    """Returns the types of the modules that a call runs and that have parameters, and those that return one of them."""
    seen: set[type[nn.Module]] = set()
    returned: list[str] = []

    def look(module: nn.Module, args: object, output: object) -> None:
        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        if own:
            seen.add(type(module))
        if any(tensor.untyped_storage().data_ptr() in own for tensor in tensors_in(output)):
            returned.append(type(module).__name__)

    hook = register_module_forward_hook(look)
    try:
        call()
    finally:
        hook.remove()
    return seen, returned


@pytest.mark.parametrize("training", [False, True])
@each_model
def test_no_module_returns_its_own_parameter(name: str, training: bool) -> None:
    model, inputs = make(name)
    _, returned = returned_parameters(lambda: model.train(training)(inputs))
    assert returned == []


OTHER_CALLS: dict[str, Callable[[], object]] = {
    "queries": lambda: pc.queries.Learned(5, dim=3)(None, torch.tensor([4, 0])),
    "one query": lambda: pc.queries.Learned(5, dim=3)(None, torch.tensor([2])),
    "all queries": lambda: pc.queries.Learned(5, dim=3)(None, torch.arange(5)),
    "a grid of another size": lambda: pc.positions.LearnedGrid((5, 7), dim=3)((7, 5), torch.zeros(1)),
    "a grid in another dtype": lambda: pc.positions.LearnedGrid((5, 7), dim=3)((5, 7), torch.zeros(1).double()),
    "all indices": lambda: pc.positions.LearnedEmbedding(5, dim=3)(torch.arange(5)),
    "no blocks": lambda: pc.Encoder(3, num_latents=5, dim=4, depth=0, num_heads=1)(torch.rand(1, 7, 3)),
    "one array": lambda: pc.AttentionResidual(4)([torch.rand(2, 5, 4)]),
    "queries on a learned grid": lambda: pc.queries.Grid((5, 7), pc.positions.LearnedGrid((5, 7), dim=3))(),
    "coordinates": lambda: pc.queries.Coordinates(pc.positions.Gaussian(2))(None, torch.rand(1, 5, 2)),
}


@pytest.mark.parametrize("call", OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_no_part_returns_its_own_parameter(call: Callable[[], object]) -> None:
    assert returned_parameters(call)[1] == []


def test_tables_are_no_parameters() -> None:
    for where in (pc.positions.LearnedGrid((5,), dim=3), pc.positions.LearnedEmbedding(5, dim=3)):
        own = {parameter.untyped_storage().data_ptr() for parameter in where.parameters()}
        tables = where.tables((5,), like=torch.zeros(()))
        assert not own & {table.untyped_storage().data_ptr() for table in tables}


def test_all_parts_with_parameters_are_covered() -> None:
    """The models above contain every registered module that has parameters."""
    seen: set[type[nn.Module]] = set()
    for name in MODELS:
        model, inputs = make(name)
        seen |= returned_parameters(lambda model=model, inputs=inputs: model(inputs))[0]
    registered = {part for part in names._named.values() if inspect.isclass(part) and issubclass(part, nn.Module)}
    own = {part for part in registered if part.__module__.startswith("perceiver_core")}
    assert {names._names[part] for part in own - seen} == WITHOUT_PARAMETERS


WITHOUT_PARAMETERS = {
    *("DropLatents", "DropTokens", "External", "Fourier", "FourierPerAxis", "FromInputs", "GEGLU", "Gaussian"),
    *("NeRF", "OneHotLabel", "Patches", "Pixels", "Rotary", "SquaredReLU", "SwiGLU", "heads.Identity"),
    *("Coordinates", "FixedGrid", "Grid", "LogMel", "PointCloud", "Spectrogram", "Video"),  # apart from positions
}


def test_the_check_detects_views() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))

        def forward(self) -> dict[str, Tokens]:
            return {"tokens": Tokens(torch.zeros(1, 2, 1), (self.weight[:, 1:],))}

    assert returned_parameters(Views())[1] == ["Views"]


# Gradients that are disabled


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_strategy
def test_no_module_gets_or_returns_a_tensor_with_a_gradient_if_they_are_disabled(
    name: str, strategy: reads.Strategy, mode: Callable[[], Any]
) -> None:
    """Views of parameters would require one; FlopCounterMode fails at them."""
    model, inputs = make(name, strategy)
    names = {id(module): part for part, module in model.named_modules()}
    found: set[str] = set()

    def look(module: nn.Module, args: object, output: object = None) -> None:
        leaves = tree_leaves((args, output))
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            found.add(names[id(module)])

    hooks = [register_module_forward_pre_hook(look), register_module_forward_hook(look)]
    try:
        with mode():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert found == set()
