"""Numbers and containers of other libraries reach constructors and records as Python's own."""

from __future__ import annotations

import array
import enum
import types
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import checks
from perceiver_core.registry import from_config, register, to_config

pytestmark = pytest.mark.no_shape_checks


@register
class Holds(nn.Module):
    """Keeps what it is given."""

    def __init__(self, value, *, more=None):
        super().__init__()
        self.value, self.more = value, more


class ConfigList(Sequence):
    """Like the lists of OmegaConf, which are no lists of Python."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


class ConfigDict(Mapping):
    """Like the dictionaries of OmegaConf."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


def same_types(one, other):
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_types, one, other))
    if isinstance(one, dict):
        return type(other) is dict and one.keys() == other.keys() and all(same_types(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


PLAIN = {
    "int64": (np.int64(3), 3),
    "uint8": (np.uint8(3), 3),
    "float32": (np.float32(0.5), 0.5),
    "float64": (np.float64(0.1), 0.1),
    "float16": (np.float16(0.5), 0.5),
    "longdouble": (np.longdouble(0.5), 0.5),
    "bool": (np.bool_(True), True),
    "str": (np.str_("x"), "x"),
    "an array of no axis": (np.array(3), 3),
    "an array of one axis": (np.array([7.0, 11.0], dtype=np.float32), [7.0, 11.0]),
    "an array of longdoubles": (np.array([0.5], dtype=np.longdouble), [0.5]),
    "an empty array": (np.array([], dtype=np.int64), []),
    "a tuple": ((np.int64(3), 5, "x"), (3, 5, "x")),
    "a list": ([np.float32(0.5), [np.int64(3)]], [0.5, [3]]),
    "a dictionary": ({"a": np.int64(3), "b": None}, {"a": 3, "b": None}),
    "a list of a configuration": (ConfigList([3, 0.5, None, "x"]), [3, 0.5, None, "x"]),
    "lists of lists": (ConfigList([ConfigList([3]), (np.int64(5),)]), [[3], (5,)]),
    "an array of Python": (array.array("d", [0.5, 7.0]), [0.5, 7.0]),
    "a range": (range(3, 5), [3, 4]),
}


@pytest.mark.parametrize("value, expected", PLAIN.values(), ids=PLAIN.keys())
def test_constructors_and_records_get_plain_values(value, expected):
    for part in (Holds(value), Holds(value=value), type("Sub", (Holds,), {})(value)):
        assert same_types(part.value, expected)
    config = to_config(Holds(None, more=value))
    assert same_types(to_config(from_config(config)), config)
    kept = from_config(config).more
    assert kept == (list(expected) if isinstance(expected, tuple) else expected) or expected == [[3], (5,)]
    assert to_config(partial(Holds, value=value)) == {"partial": "Holds", "value": to_config(expected)}


class Level(enum.IntEnum):
    LOW = 3


class Name(str, enum.Enum):
    SHORT = "x"


@pytest.mark.parametrize(
    "value",
    [np.zeros((3, 5)), torch.zeros(3), Fraction(3, 5), ConfigList([Fraction(3, 5)]), ConfigDict(a=Fraction(3, 5)), b"x",
     "x", True, range(10**9), np.array(["x", None]), np.array(3 + 5j), Level.LOW, Name.SHORT, nn.Tanh(), np.float32],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_values_reach_constructors_as_they_are(value):
    assert Holds(value).value is value


def test_containers_of_parts_are_described():
    tanh = {"part": "Tanh"}
    assert type(Holds(ConfigList([nn.Tanh(), None])).value) is list
    assert to_config(Holds(ConfigList([nn.Tanh(), None])))["value"] == [tanh, None]
    assert to_config(Holds(ConfigDict(a=nn.Tanh())))["value"] == {"dict": {"a": tanh}}


class Missing(ConfigDict):
    """A configuration of which an item is not filled in."""

    def __getitem__(self, key):
        raise KeyError(f"{key} is missing")


@pytest.mark.parametrize(
    "value, expected",
    [
        (ConfigDict(a=ConfigList([3]), b=ConfigDict(c=None)), {"a": [3], "b": {"c": None}}),
        (types.MappingProxyType({"a": np.int64(3)}), {"a": 3}),
        (ConfigList([ConfigDict(a=3)]), [{"a": 3}]),
    ],
    ids=["a configuration", "a proxy", "in a list"],
)
def test_mappings_are_dictionaries_in_records_alone(value, expected):
    assert Holds(value).value is value
    assert to_config(Holds(value)) == to_config(Holds(expected))


def test_what_cannot_be_read_or_shown_is_refused_when_it_is_saved():
    class Secret:
        def __repr__(self):
            raise RuntimeError("not shown")

    for value in (Missing(a=3), ConfigList([3, Secret()]), Secret(), ConfigDict(a=Fraction(3, 5))):
        with pytest.raises(ValueError, match="JSON cannot represent"):
            to_config(Holds(value))


def test_lists_of_plain_values_reach_constructors_as_they_are():
    for value in ([3, [5]], (3, 5), {"a": [3]}):
        assert Holds(value).value is value


@pytest.mark.parametrize(
    "value, expected",
    [(torch.tensor(3), 3), (torch.tensor(0.5), 0.5), (torch.tensor(True), True), (Level.LOW, 3), (Name.SHORT, "x")],
    ids=str,
)
def test_numbers_that_a_part_keeps_as_they_are_are_written_as_plain_ones(value, expected):
    assert same_types(to_config(Holds(value))["value"], expected)


class Index:
    """A number of some other library."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number

    def __lt__(self, other):
        return self.number < other

    def __gt__(self, other):
        return self.number > other


def test_sizes_may_be_numbers_of_other_libraries():
    checks.positive(a=np.int64(3), b=np.uint8(1), c=Index(5))
    checks.positive(at_most=5, a=Index(5))
    assert to_config(Holds(Index(5)))["value"] == 5
    for size in (np.int64(0), Index(0), np.float32(3.0), np.bool_(True), True, "3", torch.tensor(3), np.array([3, 5])):
        with pytest.raises(ValueError, match="a must be a whole number of at least 1; got"):
            checks.positive(a=size)
    with pytest.raises(ValueError, match="a must be at most 5; got"):
        checks.positive(at_most=5, a=np.int64(7))


def test_a_model_of_numbers_of_other_libraries_is_that_of_pythons(tmp_path):
    def model(whole, rate, grid):
        image = pc.adapters.Image(whole(1), positions=pc.positions.Fourier(whole(2), whole(3), max_resolution=grid))
        read = partial(pc.CrossAttend, num_heads=whole(5), dropout=rate(0.5))
        encoder = pc.Encoder(
            image.dim,
            num_latents=whole(7),
            dim=whole(14),
            num_reads=whole(2),
            depth=whole(1),
            num_heads=whole(7),
            cross_attention=read,
        )
        return pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, whole(5), dropout=rate(0.25)))

    usual = model(int, float, [11, 13])
    for grid in (np.array([11, 13]), ConfigList([11, 13]), (np.int32(11), np.int64(13))):
        other = model(np.int64, np.float32, grid)
        assert to_config(other) == to_config(usual)
        assert repr(other) == repr(usual)
        assert type(other.encoder.dim) is int and type(other.adapter.positions.num_bands) is int
        again = pc.load(pc.save(other, tmp_path))
        assert to_config(again) == to_config(usual)
