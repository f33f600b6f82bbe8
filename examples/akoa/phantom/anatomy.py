"""Anatomy of the phantom's knees and conditions of their examinations, as parameters with random spread.

Lengths are in millimeters and angles in degrees. The conditions of an examination (rotation, shift, gain, noise) do not
depend on the side of the knee.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

Side = Literal["left", "right"]


def _uniform(mean: float, spread: float) -> Any:
    """Dataclass field that `_sample` draws uniformly from mean - spread to mean + spread."""
    return field(default=mean, metadata={"spread": spread})


@dataclass(frozen=True)
class Knee:
    """Shape of one knee, the same at every visit."""

    side: Side = "right"
    size: float = _uniform(0.98, 0.08)  # factor of all lengths
    width: float = _uniform(1.0, 0.06)  # factor of mediolateral lengths
    level_shift: float = _uniform(0.0, 0.05)  # offset of the first slice, in levels
    limb_x: float = _uniform(0.0, 3.0)
    limb_width: float = _uniform(63.0, 4.0)  # half axis of the skin
    limb_height: float = _uniform(56.0, 4.0)
    skin_fat: float = _uniform(6.0, 2.5)
    shaft: float = _uniform(16.0, 1.5)
    lateral_height: float = _uniform(6.0, 2.0)  # height of the lateral facet over the medial one
    lateral_width: float = _uniform(16.5, 1.5)
    lateral_length: float = _uniform(28.0, 2.0)
    lateral_turn: float = _uniform(0.0, 4.0)
    medial_width: float = _uniform(13.5, 1.2)
    medial_length: float = _uniform(25.5, 2.0)
    medial_turn: float = _uniform(18.0, 5.0)
    notch_x: float = _uniform(-1.0, 2.0)
    notch_width: float = _uniform(10.0, 2.5)
    cartilage: float = _uniform(2.6, 0.6)
    patella_x: float = _uniform(2.0, 4.0)
    patella_y: float = _uniform(0.0, 1.5)
    patella_width: float = _uniform(21.0, 2.0)
    patella_depth: float = _uniform(10.0, 1.2)
    patella_ridge: float = _uniform(-6.0, 2.0)
    patella_turn: float = _uniform(0.0, 6.0)
    muscle: float = _uniform(1.0, 0.15)  # factor of the size of every muscle
    biceps: float = _uniform(1.0, 0.15)
    semimembranosus: float = _uniform(1.0, 0.15)
    semitendinosus: float = _uniform(1.0, 0.25)
    sartorius: float = _uniform(1.0, 0.15)
    gracilis: float = _uniform(1.0, 0.25)
    vastus_medialis: float = _uniform(1.0, 0.15)
    vastus_lateralis: float = _uniform(1.0, 0.15)
    gastrocnemius: float = _uniform(1.0, 0.2)
    hamstring_y: float = _uniform(0.0, 3.5)
    hamstring_x: float = _uniform(0.0, 3.5)
    artery_x: float = _uniform(0.0, 5.0)
    artery_y: float = _uniform(0.0, 3.0)
    effusion: float = _uniform(0.0, 1.0)  # size of the joint fluid; the sign is the side where it lies
    marrow: float = _uniform(0.19, 0.05)
    cysts: tuple[tuple[float, float, float, float], ...] = ()  # x, y, level, radius


@dataclass(frozen=True)
class Visit:
    """Conditions of one examination, the same for all slices of a volume and independent of the side."""

    seed: int = 0  # seed of the noise
    turn: float = _uniform(0.0, 17.0)  # degrees
    shift_x: float = _uniform(0.0, 7.0)  # mm
    shift_y: float = _uniform(0.0, 6.0)
    zoom: float = _uniform(1.0, 0.09)
    level_shift: float = _uniform(0.0, 0.03)
    gain: float = _uniform(0.9, 0.25)
    noise: float = _uniform(0.028, 0.016)
    bias_x: float = _uniform(0.0, 0.35)  # relative change of gain from the center to the edge
    bias_y: float = _uniform(0.0, 0.35)
    bias_r: float = _uniform(-0.1, 0.2)
    muscle: float = _uniform(0.55, 0.12)  # brightness; differs from fat by 0.1 or more, to be visible
    fat: float = _uniform(0.23, 0.1)
    cartilage: float = _uniform(0.9, 0.1)
    wedges: tuple[tuple[float, float], ...] = ()  # direction in degrees, distance from the center in mm


Shape = TypeVar("Shape", Knee, Visit)


def _sample(base: Shape, rng: np.random.Generator, share: float = 1.0) -> Shape:
    """Move each random field of `base` by up to `share` of its spread."""
    values: dict[str, Any] = {
        f.name: getattr(base, f.name) + share * f.metadata["spread"] * float(rng.uniform(-1, 1))
        for f in dataclasses.fields(base)
        if "spread" in f.metadata
    }
    return dataclasses.replace(base, **values)


def sample_knee(side: Side, rng: np.random.Generator) -> Knee:
    """Sample a knee of a new patient."""
    cysts = tuple(
        (
            float(rng.uniform(-38, 38)),
            float(rng.uniform(-38, 30)),
            float(rng.uniform(0, 1)),
            float(rng.uniform(2, 5)),
        )
        for _ in range(int(rng.integers(0, 5)))
    )
    return dataclasses.replace(_sample(Knee(), rng), side=side, cysts=cysts)


def sample_other_knee(knee: Knee, rng: np.random.Generator) -> Knee:
    """Sample the other knee of the patient: a mirror image with small differences."""
    other: Side = "left" if knee.side == "right" else "right"
    return dataclasses.replace(_sample(knee, rng, share=0.2), side=other)


def sample_visit(rng: np.random.Generator) -> Visit:
    """Sample the conditions of one examination."""
    wedges = tuple((float(rng.uniform(0, 360)), float(rng.uniform(52, 68))) for _ in range(int(rng.integers(0, 4))))
    visit = dataclasses.replace(_sample(Visit(), rng), seed=int(rng.integers(2**31)), wedges=wedges)
    if rng.uniform() < 0.2:  # fat is brighter than muscle
        return dataclasses.replace(visit, muscle=visit.fat, fat=visit.muscle)
    return visit
