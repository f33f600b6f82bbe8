"""Factories: every block has parts of its own, and shares only the modules inside `sharing.Shared`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core.blocks.factory import call
from perceiver_core.kernels import reference
from perceiver_core.models import perceiver_ar
from perceiver_core.positions import Rotary
from perceiver_core.sharing import Shared
from tests.registered import restored

N, DIM, INPUT_DIM = 7, 12, 10


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with restored():
        for part in (LearnedKernel, LearnedScale, Slope, ScaledNorm, ScaledGate):
            pc.register(part)
        yield


class LearnedKernel(nn.Module):
    """A kernel with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: pc.masks.Mask | None) -> Tensor:
        return reference(self.scale * q, k, v, mask=mask)


class LearnedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Slope(nn.Module):
    """A leaky rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.prelu(x, self.weight)


class ScaledNorm(nn.Module):
    def __init__(self, width: int, *, scale: nn.Module) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.norm(x))


class ScaledGate(nn.Module):
    def __init__(self, width: int, *, scale: nn.Module) -> None:
        super().__init__()
        self.width, self.scale = width, scale

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        return x + self.scale(read)


def factories(wrap: Callable[[nn.Module], object] = lambda module: module) -> dict[str, partial[nn.Module]]:
    """Returns the arguments of a block: partials of partials that hold modules, each of which is wrapped."""
    attention = partial(
        pc.MultiHeadAttention,
        qk_norm=partial(ScaledNorm, scale=wrap(LearnedScale())),
        rotary=wrap(Rotary()),
        kernel=wrap(LearnedKernel()),
    )
    mlp = partial(pc.MLP, activation=wrap(Slope()))
    return {"attention": attention, "mlp": mlp, "norm": partial(ScaledNorm, scale=wrap(LearnedScale()))}


def gated(wrap: Callable[[nn.Module], object] = lambda module: module) -> dict[str, partial[nn.Module]]:
    gate = partial(ScaledGate, scale=wrap(LearnedScale()))
    return {**factories(wrap), "residual": gate, "mlp_residual": gate}


Options = dict[str, "partial[nn.Module]"]
MODELS: dict[str, Callable[[Options], nn.Module]] = {
    "CrossAttend": lambda options: pc.CrossAttend(DIM, INPUT_DIM, **options),
    "SelfAttend": lambda options: pc.SelfAttend(DIM, num_heads=2, **options),
    "LatentTransformer": lambda options: pc.LatentTransformer(
        DIM, depth=3, num_heads=2, block=partial(pc.SelfAttend, **options)
    ),
    "Encoder": lambda options: pc.Encoder(
        INPUT_DIM,
        num_latents=N,
        dim=DIM,
        num_reads=3,
        depth=2,
        num_heads=2,
        share=False,
        cross_attention=partial(pc.CrossAttend, **options),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, **options)),
    ),
    "PerceiverAR": lambda options: pc.PerceiverAR(
        pc.adapters.TokenEmbedding(vocab_size=11, dim=DIM),
        num_latents=N,
        depth=2,
        num_heads=2,
        cross_attention=partial(pc.CrossAttend, **options),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, **options)),
    ),
    "GroupedRead": lambda options: pc.GroupedRead(
        INPUT_DIM,
        pc.Level(2, num_latents=3, dim=DIM, num_heads=2),
        cross_attention=partial(pc.CrossAttend, **options),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, **options)),
    ),
    "HierarchicalPerceiver": lambda options: pc.HierarchicalPerceiver(
        INPUT_DIM,
        levels=[pc.Level(2, num_latents=3, dim=DIM, num_heads=2), pc.Level(1, num_latents=3, dim=DIM, num_heads=2)],
        positions=pc.positions.LearnedGrid((13,), dim=DIM),
        cross_attention=partial(pc.CrossAttend, **options),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, **options)),
    ),
}
JOINT = {  # of blocks without gates
    "JointAttend": lambda options: pc.JointAttend(DIM, num_heads=2, **options),
    "Resampler": lambda options: pc.Resampler(
        DIM, num_latents=N, depth=3, num_heads=2, block=partial(pc.JointAttend, **options), norm=options["norm"]
    ),
}
CASES = [
    *(pytest.param(make, gated, id=name) for name, make in MODELS.items()),
    *(pytest.param(make, factories, id=name) for name, make in JOINT.items()),
]
PARTS = (LearnedKernel, LearnedScale, Slope, Rotary)


def uses(model: nn.Module, part: type[nn.Module]) -> list[nn.Module]:
    """Returns the modules of a type, one for each place where it is used."""
    return [module for _, module in model.named_modules(remove_duplicate=False) if isinstance(module, part)]


def inside(value: object, part: type[nn.Module]) -> list[nn.Module]:
    """Returns the modules of a type inside factories, each once."""
    if isinstance(value, Shared):
        value = value.module
    if isinstance(value, part):
        return [value]
    items = value.values() if isinstance(value, dict) else value.keywords.values() if isinstance(value, partial) else []
    return list(dict.fromkeys(module for item in items for module in inside(item, part)))


@pytest.mark.parametrize(("make", "options"), CASES)
def test_every_block_has_parts_of_its_own(make, options) -> None:
    given = options()
    model = make(given)
    for part in PARTS:
        modules = [*uses(model, part), *inside(given, part)]
        assert len(uses(model, part)) >= 1
        assert len({id(module) for module in modules}) == len(modules)
    assert len(uses(model, LearnedKernel)) == len(uses(model, pc.MultiHeadAttention))
    tied = "head."  # the embedding of PerceiverAR
    parameters = [p for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(tied)]
    assert len({id(p) for p in parameters}) == len(parameters)


@pytest.mark.parametrize(("make", "options"), CASES)
def test_shared_modules_are_those_of_the_factory(make, options) -> None:
    given = options(Shared)
    model = make(given)
    for part in PARTS:
        shared = {id(module) for module in inside(given, part)}
        assert {id(module) for module in uses(model, part)} == shared
    for part in (pc.MultiHeadAttention, pc.MLP, ScaledNorm, nn.LayerNorm, nn.Linear):  # only what is in Shared
        modules = uses(model, part)
        assert len({id(module) for module in modules}) == len(modules)


@pytest.mark.parametrize("wrap", [Shared, lambda module: module], ids=["shared", "own"])
@pytest.mark.parametrize(("make", "options"), CASES)
def test_a_loaded_model_shares_the_same_modules(make, options, wrap, tmp_path) -> None:
    model = make(options(wrap))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * number)
    again = pc.load(pc.save(model, tmp_path / "model"))
    for part in PARTS:
        before, after = ([modules.index(m) for m in modules] for modules in (uses(model, part), uses(again, part)))
        assert before == after  # the first place where each module is used
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [Shared, lambda module: module], ids=["shared", "own"])
def test_models_of_one_factory(wrap) -> None:
    """Two models share what one shares: nothing but modules inside `Shared`."""
    given = factories(wrap)
    first, second = (MODELS["LatentTransformer"](given) for _ in range(2))
    for part in PARTS:
        common = {id(module) for module in uses(first, part)} & {id(module) for module in uses(second, part)}
        assert common == ({id(module) for module in inside(given, part)} if wrap is Shared else set())


def test_encoders_share_parts_of_steps_that_share_weights_only() -> None:
    encoder = pc.Encoder(
        INPUT_DIM,
        num_latents=N,
        dim=DIM,
        num_reads=4,
        depth=1,
        num_heads=2,
        cross_attention=partial(pc.CrossAttend, **factories()),
    )
    assert len(uses(encoder, LearnedKernel)) == len({id(m) for m in uses(encoder, LearnedKernel)}) == 2


def test_the_defaults_of_models_are_not_shared() -> None:
    """Modules in module-level constants are copied, too."""
    constants = [perceiver_ar.ROTARY_ATTENTION.keywords["rotary"]]
    embedding = partial(pc.adapters.TokenEmbedding, vocab_size=11, dim=DIM)
    models = [pc.PerceiverAR(embedding(), num_latents=N, depth=2, num_heads=2) for _ in range(2)]
    rotary = [*constants, *(module for model in models for module in uses(model, Rotary))]
    assert len(rotary) == len({id(module) for module in rotary}) == 1 + 2 * 3


def collect(*args: object, **kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    return args, kwargs


@pytest.mark.parametrize("wrapped", [False, True])
def test_positions_of_modules_in_a_factory(wrapped: bool) -> None:
    """Modules in positional arguments, lists, tuples and dictionaries are copied, at any depth."""
    module = nn.PReLU()
    held = Shared(module) if wrapped else module
    factory = partial(collect, held, [held, (held,)], key={"a": held, "b": 3}, text="x")
    args, kwargs = call("part", factory, 7, width=11)
    first, [second, (third,)], last = args
    fourth = kwargs["key"]["a"]
    copies = (first, second, third, fourth)
    assert last == 7 and kwargs["width"] == 11 and kwargs["text"] == "x" and kwargs["key"]["b"] == 3
    assert all((copy is module) is wrapped for copy in copies)
    assert len({id(copy) for copy in copies}) == (1 if wrapped else 4)
    assert all(torch.equal(copy.weight, module.weight) for copy in copies)


@pytest.mark.parametrize("wrapped", [False, True])
def test_factories_inside_a_factory_keep_what_they_share(wrapped: bool) -> None:
    """A shared module stays wrapped until the factory that takes it is called."""
    module = nn.PReLU()
    inner = partial(collect, part=Shared(module) if wrapped else module)
    _, kwargs = call("part", partial(collect, block=partial(collect, part=inner)))
    middle = kwargs["block"]
    parts = [call("part", call("part", middle)[1]["part"])[1]["part"] for _ in range(2)]
    assert all((part is module) is wrapped for part in parts)
    assert (parts[0] is parts[1]) is wrapped


def test_functions_and_classes_are_called_as_they_are() -> None:
    assert call("part", collect, 3, width=5) == ((3,), {"width": 5})
    kernel = LearnedKernel()
    assert call("part", lambda width: kernel, 3) is kernel  # a function decides for itself


@pytest.mark.parametrize("width", [3, 5])
def test_the_factory_is_unchanged(width: int) -> None:
    given = factories()
    before = {part: [id(module) for module in inside(given, part)] for part in PARTS}
    for make, block in product([pc.SelfAttend], range(2)):
        make(DIM, num_heads=2, **given)
        assert {part: [id(module) for module in inside(given, part)] for part in PARTS} == before, block


@pytest.mark.refusal
def test_a_built_module_is_no_factory() -> None:
    with pytest.raises(TypeError, match=r"cross_attention must be a factory of modules.*got a built CrossAttend"):
        pc.Encoder(10, num_latents=3, dim=8, num_heads=2, cross_attention=pc.CrossAttend(8, 10))


@pytest.mark.refusal
def test_latent_dropout_is_a_module() -> None:
    with pytest.raises(TypeError, match=r"latent_dropout must be a module or None; got 0.1"):
        pc.Encoder(10, num_latents=3, dim=8, num_heads=2, latent_dropout=0.1)
