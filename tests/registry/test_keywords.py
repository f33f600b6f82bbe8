"""Wrong keyword arguments: errors name the nearest one, and leave errors of constructors themselves alone."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from functools import partial, wraps

import pytest
from torch import nn

import perceiver_core as pc
from perceiver_core.blocks.factory import call
from perceiver_core.registry.keywords import SYNONYMS, check_keywords
from perceiver_core.registry.names import _external, _names
from tests.registered import restored

pytestmark = [pytest.mark.no_shape_checks, pytest.mark.refusal]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with restored():
        yield


def small(**options):
    return pc.Encoder(**{"input_dim": 6, "num_latents": 5, "dim": 12, "depth": 1, "num_heads": 2, **options})


def refused(wrong, near):
    return pytest.raises(TypeError, match=rf"unexpected keyword argument '{wrong}'\. Did you mean '{near}'\?$")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        *(("latents", "num_latents"), ("n_heads", "num_heads"), ("heads", "num_heads"), ("nhead", "num_heads")),
        *(("num_layers", "depth"), ("embed_dim", "dim"), ("reads", "num_reads"), ("crossattention", "cross_attention")),
    ],
)
def test_the_nearest_name_is_named(wrong, near):
    with refused(wrong, near):
        small(**{wrong: 3})


def test_num_class():
    with refused("num_class", "num_classes"):
        pc.heads.Classification(12, num_class=3)


def test_a_name_that_resembles_none_lists_those_accepted():
    with pytest.raises(TypeError, match=r"Level\(\) got an unexpected keyword argument 'xyz'; it accepts num_groups"):
        pc.Level(1, num_latents=3, dim=5, xyz=2)
    with pytest.raises(TypeError, match=r"'x'; it accepts no keywords"):
        pc.reads.Dense(x=1)


def constructors():
    for part in _names:
        if not inspect.isclass(part) or part in _external or not part.__module__.startswith("perceiver_core."):
            continue
        names = list(inspect.signature(part).parameters)
        if names and "kwargs" not in names:
            yield pytest.param(part, names[-1], id=part.__qualname__)


@pytest.mark.parametrize(("part", "name"), [*constructors()])
def test_every_registered_class(part, name):
    with refused(f"{name}_", name):
        part(**{f"{name}_": 1})


def test_synonyms_are_not_names_of_arguments():
    """A name that a class accepts would never be looked up; one that stands for two names needs both to be ours."""
    names = {name for part in _names if part not in _external for name in inspect.signature(part).parameters}
    assert SYNONYMS.keys() <= names


class TestFactories:
    def test_a_partial_of_a_registered_class(self):
        with refused("heads", "num_heads"):
            small(cross_attention=partial(pc.CrossAttend, heads=2))

    def test_a_partial_inside_a_partial(self):
        with refused("qkdim", "qk_dim"):
            small(cross_attention=partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, qkdim=4)))

    def test_a_partial_of_an_unregistered_class_or_a_function(self):
        class Norm(nn.LayerNorm):
            pass

        def norm(dim, *, epsilon=1e-5):
            return nn.LayerNorm(dim, eps=epsilon)

        with refused("epsilon", "eps"):
            small(cross_attention=partial(pc.CrossAttend, norm=partial(Norm, epsilon=0.1)))
        with refused("epsilons", "epsilon"):
            call("part", partial(norm, epsilons=1), 3)

    def test_a_partial_of_a_kernel(self):
        with refused("chunk", "chunk_size"):
            pc.MultiHeadAttention(12, num_heads=2, kernel=partial(pc.kernels.chunked, chunk=3))


class TestErrorsOfTheConstructorItself:
    class Raises(nn.Module):
        def __init__(self, dim, *, error=None):
            super().__init__()
            raise error

    @pytest.mark.parametrize("error", [TypeError("own, got an unexpected keyword argument 'heads'"), KeyError("heads")])
    def test_they_pass_through(self, error):
        registered = pc.register(type("Raises", (self.Raises,), {}), name="Raises")
        for make in (
            partial(registered, 3),
            partial(self.Raises, 3),
            lambda: call("part", partial(self.Raises, dim=3)),
        ):
            with pytest.raises(type(error)) as caught:
                make(error=error) if isinstance(make, partial) else call(
                    "part", partial(self.Raises, dim=3, error=error)
                )
            assert caught.value is error
            assert caught.value.__cause__ is None

    def test_a_decorator_may_accept_more_than_the_constructor(self):
        def with_name(construct):
            @wraps(construct)
            def wrapper(self, *args, label=None, **kwargs):
                construct(self, *args, **kwargs)
                self.label = label

            return wrapper

        class Labeled(nn.Module):
            @with_name
            def __init__(self, dim):
                super().__init__()
                self.dim = dim

        assert pc.register(Labeled)(dim=3, label="a").label == "a"
        assert call("part", partial(Labeled, label="b"), 3).label == "b"


def test_positional_arguments_and_missing_ones_have_pythons_errors():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'num_classes'"):
        pc.heads.Classification(12)
    with pytest.raises(TypeError, match="positional argument"):
        pc.heads.Classification(12, 3, 4)


def test_a_subclass_passes_its_keywords_on():
    class Wide(pc.Encoder):
        def __init__(self, input_dim, **options):
            super().__init__(input_dim, dim=12, num_heads=2, **options)

    assert Wide(6, num_latents=3, depth=1).latents.shape == (3, 12)
    with refused("latents", "num_latents"):
        Wide(6, latents=3)


def test_signatures_and_pickles_are_as_before():
    assert list(inspect.signature(pc.heads.Classification).parameters) == ["dim", "num_classes", "norm", "dropout"]
    assert pickle.loads(pickle.dumps(small())).latents.shape == (5, 12)


def test_a_configuration_with_a_wrong_name():
    config = pc.registry.to_config(small())
    config["latents"] = config.pop("num_latents")
    with pytest.raises(ValueError, match="Did you mean 'num_latents'"):
        pc.registry.from_config(config)


def test_functions_without_a_signature_are_not_checked():
    def function(): ...

    function.__signature__ = "of a C extension"
    check_keywords(function, ["anything"])
