"""Records of constructor arguments are data: they keep nothing alive and do not stand in the way of pickling."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import types
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core.registry import from_config, register, to_config
from perceiver_core.registry.snapshot import RECORD

pytestmark = pytest.mark.no_shape_checks

DIM, HEADS = 14, 7
TOKENS = torch.rand(2, 17, 11)


def encoder(**options):
    return pc.Encoder(11, **{"num_latents": 5, "dim": DIM, "depth": 1, "num_heads": HEADS, **options})


def perceiver(head=None, **options):
    return pc.Perceiver(nn.Identity(), encoder(**options), head or pc.heads.Classification(DIM, num_classes=3)).eval()


@register
class Sum(nn.Module):
    """Keeps its modules under the names of its arguments."""

    def __init__(self, first, others=(), named=None):
        super().__init__()
        self.first, self.others = first, nn.ModuleList(others)
        self.named = nn.ModuleDict(named or {})

    def forward(self, x):
        return x + self.first(x)


@register
class Chain(nn.Module):
    """Keeps its modules under other names."""

    def __init__(self, first, more=()):
        super().__init__()
        self.layers = nn.Sequential(first, nn.Tanh(), *[module for module in more if module is not None])


@register
class Copies(nn.Module):
    """Keeps copies of its module only."""

    def __init__(self, block, count=2):
        super().__init__()
        self.count = count
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(count))


@register
class Scale(nn.Module):
    def __init__(self, by=3.0):
        super().__init__()
        self.by = by
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.by * self.weight


@register
class Anything(nn.Module):
    """Takes whatever it is given and keeps nothing."""

    def __init__(self, value=None, **more):
        super().__init__()


class OwnNorm(nn.LayerNorm):
    """A class that is not registered."""


# ---- what cannot be described


def lambdas():
    def norm(dim):
        return nn.LayerNorm(dim)

    return {
        "cross_attention": lambda dim, width: pc.CrossAttend(dim, width, norm=norm),
        "latent_transformer": partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=lambda dim: pc.MLP(dim))),
    }


def there_and_back(model):
    """The ways in which programs copy models."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield "copy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    yield "torch", torch.load(file, weights_only=False)


def test_models_with_lambdas_and_local_functions_are_copied_and_pickled():
    model = perceiver(**lambdas())
    for way, again in there_and_back(model):
        assert torch.equal(again(TOKENS), model(TOKENS)), way
        with pytest.raises(
            ValueError, match=r"encoder\.cross_attention is .*lambdas\.<locals>\.<lambda>, which is not registered"
        ):
            to_config(again)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cross_attention": lambda dim, width: pc.CrossAttend(dim, width)}, r"encoder\.cross_attention is .*<lambda>"),
        (
            {"cross_attention": partial(pc.CrossAttend, mlp=lambda dim: pc.MLP(dim))},
            r"encoder\.cross_attention\.mlp is .*<lambda>",
        ),
        (
            {"cross_attention": partial(lambda dim, width, by: pc.CrossAttend(dim, width), by=3)},
            r"encoder\.cross_attention is .*<lambda>",
        ),
        (
            {"latent_transformer": partial(pc.LatentTransformer, block=partial(pc.SelfAttend, norm=OwnNorm))},
            r"encoder\.latent_transformer\.block\.norm is tests\.registry\.test_record\.OwnNorm",
        ),
    ],
    ids=["lambda", "inside a partial", "a partial of one", "a class"],
)
def test_only_saving_refuses_what_cannot_be_described(options, message, tmp_path):
    model = perceiver(**options)
    assert model(TOKENS).shape == (2, 3)
    with pytest.raises(ValueError, match=f"{message}, which is not registered"):
        pc.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "value, message",
    [
        (object(), r"^value is <object object .*JSON cannot represent"),
        (torch.zeros(3), r"^value is a Tensor of shape \(3,\), which JSON cannot represent"),
        ([3, {5}], r"^value\.1 is \{5\}, which JSON cannot represent"),
        ({"a": {3: 5}}, r"^value\.a is \{3: 5\}, which JSON cannot represent"),
        (partial(Scale, 3.0), r"^value is a functools\.partial of positional arguments; name them"),
        (partial(Anything, value=nn.Linear(3, 5)), r"^value\.value is torch.*Linear, which is not registered. Put @"),
        (nn.Linear(3, 5), r"^value is torch.*Linear, which is not registered. Put @perceiver_core\.register above"),
        (float("nan"), r"^value is nan, which JSON cannot represent"),
    ],
    ids=["object", "tensor", "list", "dict", "positional", "module in a partial", "module", "nan"],
)
def test_the_error_is_said_when_it_is_saved_with_its_place(value, message):
    for _, part in there_and_back(Anything(value)):
        with pytest.raises(ValueError, match=message):
            to_config(part)


def test_a_function_that_is_registered_later_is_known_then():
    def factory(dim):
        return nn.LayerNorm(dim)

    factory.__qualname__ = "a_factory"
    part = Anything(partial(factory, eps=3.0))
    with pytest.raises(ValueError, match="a_factory, which is not registered"):
        to_config(part)
    register(factory)
    assert to_config(part) == {"part": "Anything", "value": {"partial": "a_factory", "eps": 3.0}}


def test_an_instance_that_a_partial_calls_is_not_its_class():
    part = Anything(partial(OwnNorm(3)))
    register(OwnNorm)
    with pytest.raises(
        ValueError, match=r"value is <tests\.registry\.test_record\.OwnNorm object>, which is not registered"
    ):
        to_config(part)


def test_another_local_function_of_the_same_name_is_not_the_one_that_was_given():
    def make(width):
        @register
        def factory(dim):
            return nn.Linear(dim, width)

        return factory

    first = Anything(make(3))
    assert to_config(first)["value"]["name"].endswith("factory")
    second = Anything(make(5))
    assert to_config(second)["value"]["name"].endswith("factory")
    with pytest.raises(ValueError, match=r"value is .*factory, which is not registered"):
        to_config(first)


# ---- nothing is kept alive


def big():
    return pc.heads.Classification(DIM, num_classes=100_003)


def test_a_replaced_head_is_neither_copied_nor_pickled_nor_kept():
    model, plain = perceiver(big()), perceiver()
    replaced = weakref.ref(model.head)
    model.head = pc.heads.Classification(DIM, num_classes=3)
    gc.collect()
    assert replaced() is None
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(plain))
    assert len(pickle.dumps(copy.deepcopy(model))) < 1.1 * len(pickle.dumps(plain))
    assert to_config(model) == to_config(plain)


@pytest.mark.parametrize("hold", [
    lambda module: module, lambda module: [module, 3], lambda module: {"a": {"b": module}},
    lambda module: partial(Scale, by=module), lambda module: partial(lambda: module), lambda module: (lambda: module),
    lambda module: {module}, lambda module: np.array([module]), lambda module: type("Local", (), {"module": module}),
], ids=["module", "list", "dict", "partial", "partial of a lambda", "lambda", "set", "array", "class"])  # fmt: skip
def test_an_argument_is_not_kept_alive(hold):
    module = Scale()
    reference = weakref.ref(module)
    part = Anything(hold(module))
    del module
    gc.collect()
    assert reference() is None
    del part


def reachable(thing):
    """Everything that a record holds, but for classes and functions that its own classes are made of."""
    found, left = {}, [thing]
    while left:
        thing = left.pop()
        if id(thing) not in found and not isinstance(thing, type):
            found[id(thing)] = thing
            left += gc.get_referents(thing)
    return found.values()


def test_records_hold_data_only():
    model = perceiver(
        partial(lambda head: head)(pc.heads.Classification(DIM, num_classes=3, norm=partial(nn.RMSNorm, eps=1e-3))),
        **{**lambdas(), "latent_dropout": pc.DropLatents(0.5, generator=torch.Generator())},
    )
    forbidden = (nn.Module, torch.Tensor, np.ndarray, torch.Generator, types.FunctionType, partial, types.CellType)
    records = [vars(module)[RECORD] for module in model.modules() if RECORD in vars(module)]
    assert len(records) > 7
    for record in records:
        assert not [thing for thing in reachable(record) if isinstance(thing, forbidden)]


# ---- where modules are kept


def test_what_stands_in_an_attribute_is_written():
    part = Sum(Scale(3.0), [Scale(5.0), Scale(7.0)], {"a": Scale(11.0)})
    part.first, part.others[1], part.named["a"] = Scale(13.0), nn.Tanh(), nn.Identity()
    part.others.append(Scale(17.0))
    for _, again in there_and_back(part):
        assert to_config(again) == {
            "part": "Sum",
            "first": {"part": "Scale", "by": 13.0},
            "others": [{"part": "Scale", "by": 5.0}, {"part": "Tanh"}, {"part": "Scale", "by": 17.0}],
            "named": {"dict": {"a": {"part": "Identity"}}},
        }


def test_a_module_is_found_where_the_part_keeps_it():
    part = Chain(Scale(3.0), [Scale(5.0), None])
    assert to_config(part) == {
        "part": "Chain",
        "first": {"part": "Scale", "by": 3.0},
        "more": [{"part": "Scale", "by": 5.0}, None],
    }
    part.layers[0] = nn.Identity()
    for _, again in there_and_back(part):
        assert to_config(again)["first"] == {"part": "Identity"}


def test_a_module_that_a_part_does_not_keep_is_described_as_it_was_given(tmp_path):
    block = Sum(Scale(3.0))
    part = Copies(block, count=3)
    block.first = nn.Tanh()
    expected = {"part": "Copies", "block": {"part": "Sum", "first": {"part": "Scale", "by": 3.0}}, "count": 3}
    for _, again in there_and_back(part):
        assert to_config(again) == expected
    assert to_config(pc.load(pc.save(part, tmp_path))) == expected


def test_an_attribute_without_a_module_is_refused():
    for change in (lambda part: setattr(part, "first", None), lambda part: delattr(part, "first")):
        part = Sum(Scale())
        change(part)
        with pytest.raises(ValueError, match=r"first is a module passed to Sum, which has none .* 'first' now"):
            to_config(part)


# ---- the same part twice


def test_copies_know_which_parts_are_one():
    shared, kernel = Scale(5.0), nn.GELU()
    part = Sum(
        Sum(shared), [Scale(5.0), shared, Anything(partial(Anything, value=[shared, kernel])), Copies(shared)],
        {"a": Anything(partial(Anything, kernel=kernel))},
    )  # fmt: skip
    same = {"same": "first.first"}
    expected = [
        {"part": "Scale", "by": 5.0},
        same,
        {
            "part": "Anything",
            "value": {"partial": "Anything", "value": [same, {"part": "GELU", "approximate": "none"}]},
        },
        {"part": "Copies", "block": same},
    ]
    for _, again in there_and_back(part):
        config = to_config(again)
        assert config["others"] == expected
        assert config["named"]["dict"]["a"]["value"]["kernel"] == {"same": "others.2.value.value.1"}
        built = from_config(config)
        assert built.others[1] is built.first.first and built.others[0] is not built.first.first


def test_two_copies_of_a_part_are_two_parts():
    one = Scale(5.0)
    config = to_config(Sum(one, [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]))
    assert config["others"] == [{"part": "Scale", "by": 5.0}] * 2


def test_vectors_that_a_head_shares_with_an_adapter_stay_shared(tmp_path):
    text = pc.adapters.TokenEmbedding(vocab_size=11, dim=DIM)
    model = nn.ModuleDict({"text": text, "head": pc.heads.TiedLogits(text)})
    again = copy.deepcopy(Sum(model["text"], [model["head"]]))
    assert to_config(again)["others"] == [{"part": "TiedLogits", "embedding": {"same": "first"}}]
    loaded = pc.load(pc.save(again, tmp_path))
    assert loaded.others[0].vectors is loaded.first.vectors


@register
class Deep(nn.Module):
    """Gives a factory to each of its layers."""

    def __init__(self, factory, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(Anything(factory) for _ in range(depth))


def test_a_partial_that_is_given_to_many_is_described_once():
    deep = Deep(partial(pc.SelfAttend, attention=partial(pc.MultiHeadAttention, rotary=pc.positions.Rotary(2))))
    nodes = [vars(layer)[RECORD].arguments["value"] for layer in deep.layers]
    assert len(nodes) == 5 and all(node is nodes[0] for node in nodes)


def test_modules_in_partials_are_copied_for_each_block():
    attention = partial(pc.MultiHeadAttention, rotary=pc.positions.Rotary(2))
    deep = encoder(depth=5, latent_transformer=partial(pc.LatentTransformer, block=partial(
        pc.SelfAttend, attention=attention)))  # fmt: skip
    configs = [to_config(block)["attention"] for block in deep.transformers[0].blocks]
    assert configs == [to_config(attention)] * 5
    assert len({id(block.attention.rotary) for block in deep.transformers[0].blocks}) == 5


def test_a_shared_module_in_a_partial_is_one_module_again():
    attention = partial(pc.MultiHeadAttention, rotary=pc.sharing.Shared(pc.positions.Rotary(2)))
    model = encoder(num_reads=2, share=False, depth=3, latent_transformer=partial(
        pc.LatentTransformer, block=partial(pc.SelfAttend, attention=attention)))  # fmt: skip
    expected = {"part": "Shared", "module": {"part": "Rotary", "dim": 2}}
    for way, copied in there_and_back(model):
        config = to_config(copied)
        assert config["latent_transformer"]["block"]["attention"]["rotary"] == expected, way
        again = from_config(config)
        rotaries = [block.attention.rotary for process in again.transformers for block in process.blocks]
        assert len(rotaries) == 6 and len(set(rotaries)) == 1
        assert to_config(again) == to_config(model)


# ---- other processes


@pytest.mark.slow
def test_a_model_goes_to_another_process_and_back():
    model = perceiver(**lambdas()).requires_grad_(False)
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(model, TOKENS).result(timeout=300)
    torch.testing.assert_close(found, model(TOKENS))
