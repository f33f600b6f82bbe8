"""Any change of a configuration or of the weights loads or is refused in words."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, kernels, positions, registry, sharing
from tests.checkpoints.folders import MULTI_HEAD, contents, fourier, perceiver, write

pytestmark = pytest.mark.no_shape_checks


def leaves(value, path=()):
    """The path of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


RICH = perceiver(
    adapters.PerRead(
        [adapters.Audio(5, positions=fourier(1)), adapters.Image(1, positions=positions.LearnedGrid((5, 7), 3))]
    ),
    num_reads=2, share=sharing.none, cross_attention=partial(
        pc.CrossAttend, norm=partial(nn.LayerNorm, eps=1e-3), mlp=partial(pc.MLP, activation=pc.GEGLU()),
        attention=partial(MULTI_HEAD, kernel=partial(kernels.chunked, chunk_size=3))),
)  # fmt: skip
CONFIG_OF_RICH = json.loads(json.dumps(registry.to_config(RICH)))
PATHS = list(leaves(CONFIG_OF_RICH))
WORDS = st.sampled_from(sorted(registry.names._named))
SCALARS = st.none() | st.booleans() | st.integers(-5, 10**5) | st.floats(allow_nan=False, allow_infinity=False)
KINDS = st.sampled_from(["part", "partial", "name", "same", "dict"])
NAMES = st.sampled_from(["dim", "num_heads", "depth", "norm", "mlp", "num_axes", "grid", "patch_size"])


def deeper(inner):
    plain = st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | KINDS, inner, max_size=3)
    calls = st.builds(lambda kind, word, rest: {**rest, kind: word}, KINDS, WORDS, st.dictionaries(NAMES, inner))
    return plain | calls | st.fixed_dictionaries({"part": WORDS})


JSON = st.recursive(SCALARS | WORDS | st.text(max_size=5), deeper, max_leaves=6)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    path = tmp_path_factory.mktemp("rich")
    pc.save(RICH, path)
    return path


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_change_of_a_configuration_loads_or_is_refused(rich, path, value):
    model = copy.deepcopy(CONFIG_OF_RICH)
    inner = model
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    write(rich, model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert isinstance(pc.load(rich), nn.Module)
    except ValueError as error:
        assert len(str(error)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 2**10


@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_any_change_of_the_weights_loads_or_is_refused(saved, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz")
    good = contents(saved)
    (path / "config.json").write_bytes(good["config.json"])
    weights = bytearray(good["model.safetensors"])
    for _ in range(data.draw(st.integers(1, 3))):
        weights[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(weights[: data.draw(st.integers(0, len(weights)) | st.just(len(weights)))])
    with contextlib.suppress(ValueError):
        pc.load(path)
