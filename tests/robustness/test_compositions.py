"""Random compositions in continuous integration. `make fuzz` runs many more; see `tests.robustness.fuzzing`."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import perceiver_core as pc
from perceiver_core import adapters, blocks, checks, heads, kernels, losses, models, positions, queries, sharing
from perceiver_core.reads import KeysValues, factored_keys_values
from tests.robustness import composition_models
from tests.robustness.composition_draws import Draw
from tests.robustness.composition_functions import run_function
from tests.robustness.composition_generation import generated
from tests.robustness.compositions import Escape, run, run_case

CASES, BLOCK = 300, 25

# Public names that are no parts of models: protocols, submodules, and parts that other parts use.
NOT_DRAWN = {
    "positions.Positions",
    "models.presets",
    "models.sampling",
    "models.stream",
    "kernels.PartialAttention",
    "kernels.attention_map",
}


@pytest.mark.refusal
@pytest.mark.parametrize("start", range(0, CASES, BLOCK))
def test_compositions_are_equal_on_all_paths_or_refused(start, tmp_path):
    outcomes = [run_case(seed, _folder(tmp_path, seed)) for seed in range(start, start + BLOCK)]
    assert sum(outcome.startswith("equal") for outcome in outcomes) > BLOCK / 3


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(source=st.randoms(use_true_random=False))
def test_valid_compositions_are_equal_on_all_paths(source, tmp_path_factory):
    """Hypothesis draws the choices, so that it can look for a simpler composition that fails."""
    run(Draw(source, invalid=False), tmp_path_factory.mktemp("case"), "hypothesis")


def _folder(tmp_path, seed):
    folder = tmp_path / str(seed)
    folder.mkdir()
    return folder


@pytest.mark.no_shape_checks
def test_every_public_part_is_drawn(tmp_path):
    packages = adapters, positions, heads, queries, blocks, models, kernels, sharing
    missing = set().union(*map(_public, packages)) | {f"losses.{name}" for name in _functions(losses)}
    missing -= NOT_DRAWN
    for seed in range(CASES):
        draw = Draw(random.Random(seed), invalid=False)
        if draw.flag():
            run_function(draw, tmp_path)
        else:
            case = composition_models.draw_case(draw)
            used = (type(part) for part in case.model.modules())
            draw.used.update(f"{part.__module__}.{part.__qualname__}" for part in used)
            if isinstance(case.model, pc.PerceiverAR) and not case.model.embedding.vectors.is_meta and draw.batch:
                generated(draw, composition_models.in_dtype(case, draw.dtype), tmp_path)
        missing = {name for name in missing if _key(name) not in draw.used}
        if not missing:
            return
    pytest.fail(f"no case of {CASES} uses {sorted(missing)}. Draw them in tests/robustness/composition_*.py")


def _public(package: ModuleType) -> set[str]:
    short = package.__name__.rpartition(".")[2]
    return {f"{short}.{name}" for name in getattr(package, "__all__", _functions(package))}


def _functions(module: ModuleType) -> list[str]:
    """Return the names of the public functions and classes that a module defines."""
    return [
        name for name, x in vars(module).items() if name[0] != "_" and getattr(x, "__module__", 0) == module.__name__
    ]


def _key(name: str) -> str:
    package, _, thing = name.partition(".")
    part = getattr(globals()[package], thing)
    return f"{part.__module__}.{part.__qualname__}"


def _factored(monkeypatch):
    factor = factored_keys_values.FactoredKeysValues.form

    def wrong(self, dtype):
        formed = factor(self, dtype)
        return formed._replace(keys=formed.keys * 1.01)

    monkeypatch.setattr(factored_keys_values.FactoredKeysValues, "form", wrong)


def _cached(monkeypatch):
    append = KeysValues.append
    monkeypatch.setattr(KeysValues, "append", lambda self, later: append(self, later._replace(keys=later.keys * 1.01)))


def _unchecked(monkeypatch):
    monkeypatch.setattr(checks, "positive", lambda **sizes: None)


@pytest.mark.refusal
@pytest.mark.parametrize(
    "plant, first, message",  # the search starts at a seed that found the error when the test was written
    [(_factored, 9, "AssertionError: .*off by"), (_cached, 28, "AssertionError: logits"), (_unchecked, 17, "invalid")],
)
def test_a_planted_error_escapes(plant, first, message, monkeypatch, tmp_path):
    plant(monkeypatch)
    with pytest.raises(Escape, match=message):
        for seed in range(first, first + CASES):
            run(Draw(random.Random(seed), invalid=plant is _unchecked), _folder(tmp_path, seed))
