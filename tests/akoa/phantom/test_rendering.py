"""Phantom knees: asymmetric at every level, exactly mirrored, with visits independent of the side."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from examples.akoa.phantom.anatomy import Knee, Side, Visit, sample_knee, sample_other_knee, sample_visit
from examples.akoa.phantom.canvas import HEIGHT, WIDTH
from examples.akoa.phantom.rendering import render

pytestmark = pytest.mark.no_shape_checks


def other(knee: Knee) -> Knee:
    side: Side = "left" if knee.side == "right" else "right"
    return dataclasses.replace(knee, side=side)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", [0.0, 0.37, 1.0])
def test_the_mirror_of_a_knee_is_exactly_a_knee_of_the_other_side(seed: int, level: float) -> None:
    rng = np.random.default_rng(seed)
    knee, visit = sample_knee("right", rng), sample_visit(rng)
    right, left = render(knee, visit, level), render(other(knee), visit, level)
    assert right.shape == (HEIGHT, WIDTH) and right.dtype == np.uint8
    assert np.array_equal(left, right[:, ::-1])
    assert not np.array_equal(left, right)


@pytest.mark.parametrize("level", np.linspace(0, 1, 7))
def test_every_level_is_handed(level: float) -> None:
    quiet = Visit(noise=0.0)
    right = render(Knee(), quiet, level).astype(float)
    # Shrunk to blocks of 4 mm, so that fine detail does not count.
    blocks = right[:224, :256].reshape(28, 8, 32, 8).mean((1, 3))
    assert np.abs(blocks - blocks[:, ::-1]).max() > 15


@pytest.mark.parametrize("seed", range(3))
def test_wedges_brightness_and_border_are_those_of_the_mirrored_image(seed: int) -> None:
    """What a visit adds cannot tell a left knee from a right one turned over."""
    rng = np.random.default_rng(seed)
    knee = sample_knee("right", rng)
    visit = dataclasses.replace(sample_visit(rng), wedges=((20.0, 55.0), (250.0, 58.0)))
    right, left = render(knee, visit), render(other(knee), visit)
    assert (right == 0).sum() > 1000  # there are wedges to look at
    assert np.array_equal(left == 0, (right == 0)[:, ::-1])
    assert np.array_equal(np.bincount(left.ravel()), np.bincount(right.ravel()))
    assert np.array_equal(left[[0, -1]], right[[0, -1], ::-1])
    assert np.array_equal(left[:, [0, -1]], right[:, [-1, 0]])


@pytest.mark.parametrize("name", ["turn", "shift_x", "bias_x"])
def test_a_visit_leans_to_neither_side(name: str) -> None:
    """Drawn around 0, so the mirror of a visit is as likely as the visit; wedges point anywhere."""
    assert getattr(Visit(), name) == 0.0
    visits = [sample_visit(np.random.default_rng(seed)) for seed in range(300)]
    lean = np.array([getattr(visit, name) for visit in visits])
    assert abs(lean.mean()) < 3 * lean.std() / np.sqrt(len(lean))
    directions = np.radians([direction for visit in visits for direction, _ in visit.wedges])
    assert abs(np.cos(directions).mean()) < 3 / np.sqrt(2 * len(directions))


def drawn(kind: type[Knee] | type[Visit]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if "spread" in f.metadata]


def changes(old: Knee | Visit, name: str) -> Knee | Visit:
    spread = next(f for f in dataclasses.fields(old) if f.name == name).metadata["spread"]
    return dataclasses.replace(old, **{name: getattr(old, name) + spread})


@pytest.mark.parametrize("name", drawn(Knee))
def test_every_shape_parameter_changes_some_slice(name: str) -> None:
    knee = changes(Knee(), name)
    assert isinstance(knee, Knee)
    assert any(not np.array_equal(render(knee, level=level), render(Knee(), level=level)) for level in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("name", drawn(Visit))
def test_every_visit_parameter_changes_the_image(name: str) -> None:
    visit = changes(Visit(), name)
    assert isinstance(visit, Visit)
    assert not np.array_equal(render(Knee(), visit), render(Knee(), Visit()))


def test_wedges_and_cysts_show() -> None:
    plain = render(Knee(), Visit(), 0.5)
    wedge = render(Knee(), Visit(wedges=((30.0, 55.0),)), 0.5)
    assert (wedge == 0).sum() > (plain == 0).sum() + 100
    cyst = render(Knee(cysts=((5.0, 0.0, 0.5, 5.0),)), Visit(), 0.5)
    assert cyst.astype(int).sum() > plain.astype(int).sum() + 1000


def test_neighboring_slices_are_more_alike_than_distant_ones() -> None:
    rng = np.random.default_rng(3)
    knee, visit = sample_knee("left", rng), sample_visit(rng)
    levels = np.linspace(0, 1, 40)[::3]
    stack = np.stack([render(knee, visit, float(level)) for level in levels]).astype(float)
    apart = {step: np.abs(stack[step:] - stack[:-step]).mean() for step in (1, 4, 9)}
    assert apart[1] < apart[4] < apart[9]


def test_siblings_differ_a_little_and_strangers_more() -> None:
    rng = np.random.default_rng(7)
    knee = sample_knee("right", rng)
    sibling, stranger = other(sample_other_knee(knee, rng)), sample_knee("right", rng)

    def distance(second: Knee) -> float:
        levels, visit = (0.0, 0.5, 1.0), Visit(noise=0.0)
        pairs = ((render(knee, visit, t), render(second, visit, t)) for t in levels)
        return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in pairs]))

    assert 0 < distance(sibling) < 0.6 * distance(stranger)


def test_bad_slices_are_named() -> None:
    with pytest.raises(ValueError, match=r"level=1\.5: expected a number from 0"):
        render(Knee(), level=1.5)
    with pytest.raises(ValueError, match="side='middle': expected 'left' or 'right'"):
        render(Knee(side="middle"))  # type: ignore[arg-type]
