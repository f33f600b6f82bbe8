"""Configurations of values, and values of configurations."""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import registry
from perceiver_core.registry import from_config, register, to_config

pytestmark = pytest.mark.no_shape_checks


@register
class Shift(nn.Module):
    def __init__(self, by=3, *, times=2, **more):
        super().__init__()
        self.by, self.more = by, more


@register
class Holder(nn.Module):
    def __init__(self, inner, others=()):
        super().__init__()
        self.inner, self.others = inner, nn.ModuleList(others)


@register
class Numbers(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers


class Unregistered(Shift):
    pass


@register
class Wider(Shift):
    def __init__(self, width):
        super().__init__(by=width * 5, times=7)


@register
class Bare(Shift):
    """A subclass without a constructor of its own."""


@register
@dataclass(frozen=True)
class Windowed:
    """A kernel with a setting."""

    size: int = 11

    def __call__(self, q, k, v, *, mask=None):
        return q


@register
def a_kernel(q, k, v, *, mask=None, scale=1.0):
    return v


def unregistered_kernel(q, k, v, *, mask=None):
    return v


# ---- what is recorded


@pytest.mark.parametrize(
    "part, written",
    [
        (lambda: Shift(), {}),
        (lambda: Shift(5), {"by": 5}),
        (lambda: Shift(5, times=11), {"by": 5, "times": 11}),
        (lambda: Shift(times=11, by=5), {"by": 5, "times": 11}),
        (lambda: Shift(tail=7, head=None), {"tail": 7, "head": None}),
    ],
    ids=["defaults", "positional", "keyword", "in the constructor's order", "**kwargs"],
)
def test_arguments_are_recorded_by_name_as_given(part, written):
    made = part()
    assert to_config(made) == {"part": "Shift", **written}
    again = from_config(to_config(made))
    assert (again.by, again.more) == (made.by, made.more)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -2.5, 1e-12, "é ü", [], [1, [2, "x"]], {"a": [1], "part of": 2}, (), 2**70],
    ids=repr,
)
def test_a_plain_value_comes_back(value):
    given = list(value) if isinstance(value, tuple) else value
    assert from_config(to_config(Numbers(value))).numbers == given


@pytest.mark.parametrize(
    "value",
    [{1: 2}, {3, 5}, float("nan"), float("inf"), np.zeros((3, 5)), torch.zeros(3), torch.float32, object(), b"x"],
    ids=lambda value: type(value).__name__,
)
def test_a_value_without_a_word_in_json_is_refused_with_its_place(value):
    with pytest.raises(ValueError, match=r"inner\.numbers is .*JSON cannot represent.*Give numbers"):
        to_config(Holder(Numbers(value)))


def test_an_enumeration_is_its_value():
    assert to_config(Numbers(enum.IntEnum("Size", "small")(1)))["numbers"] == 1


def test_lists_are_recorded_as_they_were_given():
    numbers, words = [3, 5], {"a": [7]}
    parts = Numbers(numbers), Numbers(words)
    numbers.append(11)
    words["a"].append(13)
    assert [to_config(part)["numbers"] for part in parts] == [[3, 5], {"dict": {"a": [7]}}]


def test_partials_classes_and_functions_nest():
    read = partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, kernel=partial(a_kernel, scale=0.5)))
    assert to_config(read) == {
        "partial": "CrossAttend",
        "attention": {"partial": "MultiHeadAttention", "kernel": {"partial": "a_kernel", "scale": 0.5}},
    }
    again = from_config(to_config(read))
    assert again.func is pc.CrossAttend
    assert again.keywords["attention"].keywords["kernel"].func is a_kernel
    assert to_config(nn.Identity) == {"name": "Identity"}


def test_a_kernel_that_is_an_object_is_a_part():
    assert to_config(Windowed(size=5)) == {"part": "Windowed", "size": 5}
    assert from_config(to_config(Windowed())) == Windowed()


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(), nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.GELU("tanh"),
        nn.LayerNorm(7), nn.LayerNorm((5, 7), eps=1e-3), nn.LayerNorm(7, elementwise_affine=False),
        nn.LayerNorm(7, bias=False), nn.RMSNorm(7), nn.RMSNorm(7, eps=1e-3, elementwise_affine=False),
    ],
    ids=repr,
)  # fmt: skip
def test_parts_of_torch_come_back(module):
    again = from_config(to_config(module))
    assert repr(again) == repr(module)
    assert again.state_dict().keys() == module.state_dict().keys()


# ---- what may be registered


def test_subclasses_record_their_own_arguments():
    assert to_config(Wider(3)) == {"part": "Wider", "width": 3}
    assert to_config(Bare(times=5)) == {"part": "Bare", "times": 5}
    assert from_config(to_config(Wider(3))).by == 15


def test_a_subclass_that_is_not_registered_is_refused():
    with pytest.raises(
        ValueError, match=r"inner is tests\.registry\.test_registry\.Unregistered, which is not registered. Put @perc"
    ):
        to_config(Holder(Unregistered()))


@pytest.mark.parametrize(
    "kernel",
    [unregistered_kernel, lambda q, k, v, mask=None: v, max, nn.Linear, partial(unregistered_kernel)],
    ids=["function", "lambda", "builtin", "class", "partial"],
)
def test_a_function_that_is_not_registered_is_refused_with_its_name_and_place(kernel):
    read = partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, kernel=kernel))
    name = getattr(kernel, "__qualname__", "unregistered_kernel").replace("<", r"\<")
    with pytest.raises(ValueError, match=rf"attention\.kernel is .*{name}.*not registered"):
        to_config(read)


def test_a_local_function_is_refused():
    def local(q, k, v, *, mask=None):
        return v

    with pytest.raises(ValueError, match=r"kernel is .*<locals>\.local, which is not registered"):
        to_config(partial(pc.MultiHeadAttention, kernel=local))


def test_a_partial_of_positional_arguments_is_refused():
    with pytest.raises(ValueError, match="positional arguments; name them"):
        to_config(partial(pc.CrossAttend, 3))


def test_an_object_that_is_not_a_part_cannot_be_called_by_name():
    with pytest.raises(ValueError, match="JSON cannot represent"):
        to_config(Numbers(iter([])))
    with pytest.raises(ValueError, match="not registered"):
        to_config(partial(Unhashable()))


class Unhashable:
    __hash__ = None

    def __call__(self):
        return None


def test_a_name_is_taken_once():
    with pytest.raises(
        ValueError, match=r"name 'MLP' is taken by perceiver_core.*register tests\.registry\.test_registry.* another"
    ):
        register(type("MLP", (nn.Module,), {}))
    register(type("MLP", (nn.Module,), {"__module__": __name__}), name="my.MLP")
    assert from_config({"part": "my.MLP"}).__module__ == __name__


def test_a_cell_that_is_run_again_replaces_what_it_registered():
    cell = (
        "@register\nclass Cell(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n        self.n = n "
    )
    names = {"register": register, "nn": nn, "__name__": "a_notebook"}
    exec(cell + "* 3", names)
    old = names["Cell"](5)
    exec(cell + "* 7", names)
    assert from_config(to_config(names["Cell"](5))).n == 35
    assert from_config(to_config(old)).n == 35  # what has been trained can still be saved


def test_a_local_thing_that_is_registered_again_loses_its_name():
    def make(width):
        @register
        def kernel(q, k, v, *, mask=None):
            return v * width

        return kernel

    first, second = make(3), make(5)
    assert from_config(to_config(second)) is second
    with pytest.raises(ValueError, match="not registered"):
        to_config(first)


def test_registering_twice_records_once():
    assert register(Shift) is Shift
    assert to_config(Shift(5)) == {"part": "Shift", "by": 5}


def test_a_part_made_before_its_class_was_registered_is_refused():
    late = type("Late", (nn.Module,), {})
    made = late()
    register(late)
    with pytest.raises(ValueError, match=r"built before .*Late was registered; build it again"):
        to_config(made)
    assert to_config(late()) == {"part": "Late"}


def test_what_cannot_be_named_is_not_registered():
    with pytest.raises(
        ValueError, match=r"lambda> has no name of its own; write a function, or register\(\.\.\., name"
    ):
        register(lambda q, k, v, mask=None: v)
    half = register(lambda q, k, v, mask=None: v / 2, name="half")
    assert from_config(to_config(half)) is half
    for thing in (partial(a_kernel), Shift(), 3):
        with pytest.raises(ValueError, match="takes a class or a function"):
            register(thing)


@pytest.mark.parametrize("name", ["part", "partial", "name", "same", "dict"])
def test_reserved_words_are_no_arguments(name):
    names = {"nn": nn}
    exec(f"class A(nn.Module):\n    def __init__(self, {name}):\n        super().__init__()", names)
    with pytest.raises(ValueError, match=f"A has an argument named '{name}', which is reserved; rename it"):
        register(names["A"])


@pytest.mark.parametrize("arguments", ["*args", "a, /", "a, *args, b=3"])
def test_arguments_without_names_are_refused(arguments):
    names = {"nn": nn}
    exec(f"class A(nn.Module):\n    def __init__(self, {arguments}):\n        super().__init__()", names)
    with pytest.raises(ValueError, match=r"A takes .* without a name; take a list, or a named argument"):
        register(names["A"])


def test_a_reserved_word_among_further_arguments_is_refused_when_built():
    for reserved in ("name", "dict"):
        with pytest.raises(ValueError, match="must hold exactly one of"):
            from_config(to_config(Shift(**{reserved: 3})))


# ---- what has been replaced


def test_a_module_is_described_as_it_is_now():
    holder = Holder(Shift(3), [Shift(5), Shift(7)])
    holder.inner, holder.others[1] = nn.Identity(), nn.Tanh()
    assert to_config(holder) == {
        "part": "Holder",
        "inner": {"part": "Identity"},
        "others": [{"part": "Shift", "by": 5}, {"part": "Tanh"}],
    }


# ---- the same part twice


def test_a_part_that_is_given_twice_is_one_part_again():
    shared = Shift(5)
    config = to_config(Holder(Holder(shared), [Shift(5), shared, Numbers(partial(Numbers, numbers=[shared]))]))
    first, *others = config["others"]
    assert first == {"part": "Shift", "by": 5}
    assert others == [
        {"same": "inner.inner"},
        {"part": "Numbers", "numbers": {"partial": "Numbers", "numbers": [{"same": "inner.inner"}]}},
    ]
    again = from_config(config)
    assert again.others[1] is again.inner.inner
    assert again.others[2].numbers.keywords["numbers"] == [again.inner.inner]
    assert again.others[0] is not again.inner.inner


@pytest.mark.parametrize("path", ["inner", "others.0", "", "nowhere", 3, None, ["inner"], {"part": "Shift"}])
def test_a_part_is_the_same_only_as_an_earlier_one(path):
    with pytest.raises(ValueError, match=r"inner is the same as .*, but no part stands there before it"):
        from_config({"part": "Holder", "inner": {"same": path}, "others": [{"part": "Shift"}]})


def test_partials_are_not_shared():
    """A short chain of partials that each name the next one twice would build exponentially many modules."""
    config: dict[str, object] = {"partial": "MLP", "activation": {"part": "GELU", "approximate": "none"}}
    for level in range(20):
        path = "cross_attention" + ".attention" * (20 - level)
        config = {"partial": "CrossAttend", "attention": config, "mlp": {"same": path}}
    sizes = {"input_dim": 10, "num_latents": 4, "dim": 32, "depth": 1, "num_heads": 1}
    with pytest.raises(ValueError, match="but no part stands there before it"):
        from_config({"part": "Encoder", **sizes, "cross_attention": config})


# ---- what a description may not be


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "the model must hold exactly one of"),
        ({"head": 3}, r"exactly one of .*found \['head'\]"),
        ({"part": "Shift", "name": "Shift"}, "exactly one of"),
        ({"part": "os.system"}, "names 'os.system', which is not registered. If it is your own, import"),
        ({"part": "builtins.eval", "source": "1"}, "not registered"),
        ({"name": "torch.load"}, "not registered"),
        ({"part": "__class__"}, "not registered"),
        ({"part": "Shift.__init__"}, "not registered"),
        ({"part": "nn.Linear"}, "not registered"),
        ({"part": "Linear"}, "not registered"),
        ({"partial": "nn.Identity"}, "not registered"),
        ({"part": None}, "not registered"),
        ({"part": ["Shift"]}, "not registered"),
        ({"part": {"part": "Shift"}}, "not registered"),
        ({"part": "x" * 1000}, r"names 'x{70,80}\.\.\., which"),
        ({"part": "a_kernel", "q": 1, "k": 2, "v": 3}, "names 'a_kernel', which is not a part but a function"),
        ({"part": "paper", "steps": 3}, "not a part but a function"),
        ({"name": "a_kernel", "scale": 3}, r"must hold 'name' alone; found \['scale'\] beside it"),
        ({"dict": {}, "x": 3}, "must hold 'dict' alone"),
        ({"dict": [3]}, r"must hold an object under 'dict'; got \[3\]"),
        ({"part": "Numbers"}, "Numbers cannot be built from its configuration: .*missing .*'numbers'"),
        (
            {"part": "Numbers", "numbers": 3, "number": 3},
            "Numbers cannot be built from its configuration: .*unexpected .*'number'",
        ),
        ({"part": "Numbers", "numbers": 3, "self": 3}, "Numbers cannot be built from its configuration"),
        ({"part": "Numbers", "numbers": 3, "__class__": 3}, "unexpected keyword argument '__class__'"),
        ({"part": "Holder", "inner": {"part": "Wider", "width": None}}, "inner: Wider cannot be built"),
        (
            {"part": "LayerNorm", "normalized_shape": 7, "device": "cpu"},
            r"gives LayerNorm \['device', .*may have \['no",
        ),
        ({"partial": "LayerNorm", "device": "cpu"}, "gives LayerNorm"),
        ({"part": "Identity", "size": 10**9}, "gives Identity"),
    ],
)
def test_malformed_descriptions_say_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config)


def test_an_error_without_words_is_named():
    @partial(register, name="Wordless")
    class Wordless(nn.Module):
        def __init__(self):
            raise KeyError

    with pytest.raises(ValueError, match="Wordless cannot be built from its configuration: KeyError"):
        from_config({"part": "Wordless"})


def test_depth_is_bounded():
    config: object = {"part": "Shift"}
    for _ in range(5000):
        config = [config]
    with pytest.raises(ValueError, match="nested too deeply"):
        from_config(config)


def test_modules_are_bounded_in_this_thread_only():
    with registry.at_most(3):
        nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh())
        with pytest.raises(ValueError, match="has more modules than the file has weights for"):
            nn.Sequential(nn.Tanh())
        with registry.at_most(1):
            nn.Sequential(nn.Tanh())
        elsewhere: list[nn.Module] = []
        thread = threading.Thread(target=lambda: elsewhere.append(nn.Sequential(nn.Tanh())))
        thread.start()
        thread.join()
        assert len(elsewhere) == 1
    nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Tanh())


# ---- what a module was told


def test_settings_tell_what_has_been_changed():
    for make, change in [
        (lambda: nn.Dropout(0.1), lambda module: setattr(module, "p", 0.5)),
        (lambda: Numbers([3]), lambda module: setattr(module, "numbers", [5])),
        (lambda: Numbers(a_kernel), lambda module: setattr(module, "numbers", partial(a_kernel, scale=3.0))),
        (lambda: Numbers(3), lambda module: setattr(module, "numbers", torch.zeros(3))),
    ]:
        module = make()
        assert registry.settings(module) == registry.settings(make())
        change(module)
        assert registry.settings(module) != registry.settings(make())
    assert registry.settings(Secretive()) == "tests.registry.test_registry.Secretive()"


class Secretive(nn.Module):
    def extra_repr(self):
        raise RuntimeError("not asked")
