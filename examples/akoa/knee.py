"""What a phantom's knee and a visit are, and the axial slice that one at the other shows.

What is unusual: anatomy is drawn once, as a right knee in millimeters, and a left knee is that
picture reversed, so the mirror of a phantom knee is exactly a knee of the other side. Handedness is
in the anatomy of every slice, and nowhere else: what a visit adds (turn, shift, gain, noise) is
drawn without looking at the side. What keeps it hard for a model that only compares pixels is
that knees turn by 17 degrees, shift by 7 mm, differ in the size of every part, and may have their
muscles paler or darker than fat.

Frame of the limb: millimeters, origin in the femur, x to the right of the picture, which is lateral
in a right knee, y down, which is anterior. A level in [0, 1] runs from femoral shaft to condyles.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from examples.akoa.shapes import HEIGHT, WIDTH, Canvas, Floats, ellipse, join, mix, smooth_step

Side = Literal["left", "right"]
Picture = npt.NDArray[np.uint8]


def _about(mean: float, spread: float) -> Any:
    """A field that `_draw` fills uniformly from mean - spread to mean + spread."""
    return field(default=mean, metadata={"spread": spread})


@dataclass(frozen=True)
class Knee:
    """One knee's fixed shape, the same at every visit. Lengths in mm, turns in degrees."""

    side: Side = "right"
    size: float = _about(0.98, 0.08)  # factor on every length
    width: float = _about(1.0, 0.06)  # factor on mediolateral lengths alone
    level_shift: float = _about(0.0, 0.05)  # where the volume starts, in levels
    limb_x: float = _about(0.0, 3.0)
    limb_width: float = _about(63.0, 4.0)  # half axis of the skin
    limb_height: float = _about(56.0, 4.0)
    skin_fat: float = _about(6.0, 2.5)
    shaft: float = _about(16.0, 1.5)
    lateral_height: float = _about(6.0, 2.0)  # how far the lateral facet rises over the medial one
    lateral_width: float = _about(16.5, 1.5)
    lateral_length: float = _about(28.0, 2.0)
    lateral_turn: float = _about(0.0, 4.0)
    medial_width: float = _about(13.5, 1.2)
    medial_length: float = _about(25.5, 2.0)
    medial_turn: float = _about(18.0, 5.0)
    notch_x: float = _about(-1.0, 2.0)
    notch_width: float = _about(10.0, 2.5)
    cartilage: float = _about(2.6, 0.6)
    patella_x: float = _about(2.0, 4.0)
    patella_y: float = _about(0.0, 1.5)
    patella_width: float = _about(21.0, 2.0)
    patella_depth: float = _about(10.0, 1.2)
    patella_ridge: float = _about(-6.0, 2.0)
    patella_turn: float = _about(0.0, 6.0)
    muscle: float = _about(1.0, 0.15)  # factor on the size of every muscle
    biceps: float = _about(1.0, 0.15)
    semimembranosus: float = _about(1.0, 0.15)
    semitendinosus: float = _about(1.0, 0.25)
    sartorius: float = _about(1.0, 0.15)
    gracilis: float = _about(1.0, 0.25)
    vastus_medialis: float = _about(1.0, 0.15)
    vastus_lateralis: float = _about(1.0, 0.15)
    gastrocnemius: float = _about(1.0, 0.2)
    hamstring_y: float = _about(0.0, 3.5)
    hamstring_x: float = _about(0.0, 3.5)
    artery_x: float = _about(0.0, 5.0)
    artery_y: float = _about(0.0, 3.0)
    effusion: float = _about(0.0, 1.0)  # joint fluid: its size, and by its sign the side it gathers on
    marrow: float = _about(0.19, 0.05)
    cysts: tuple[tuple[float, float, float, float], ...] = ()  # x, y, level, radius


@dataclass(frozen=True)
class Visit:
    """What one examination does to every slice of a volume; no part of it knows the side."""

    seed: int = 0  # of the noise
    turn: float = _about(0.0, 17.0)  # degrees
    shift_x: float = _about(0.0, 7.0)  # mm
    shift_y: float = _about(0.0, 6.0)
    zoom: float = _about(1.0, 0.09)
    level_shift: float = _about(0.0, 0.03)
    gain: float = _about(0.9, 0.25)
    noise: float = _about(0.028, 0.016)
    bias_x: float = _about(0.0, 0.35)  # relative change of gain from the middle to the edge
    bias_y: float = _about(0.0, 0.35)
    bias_r: float = _about(-0.1, 0.2)
    muscle: float = _about(0.55, 0.12)  # brightness; never within 0.1 of fat, or it would not show
    fat: float = _about(0.23, 0.1)
    cartilage: float = _about(0.9, 0.1)
    wedges: tuple[tuple[float, float], ...] = ()  # direction in degrees, distance from the middle in mm


Shape = TypeVar("Shape", Knee, Visit)


def _draw(base: Shape, rng: np.random.Generator, share: float = 1.0) -> Shape:
    """`base` with each field moved by up to `share` of its spread."""
    moved: dict[str, Any] = {
        f.name: getattr(base, f.name) + share * f.metadata["spread"] * float(rng.uniform(-1, 1))
        for f in dataclasses.fields(base)
        if "spread" in f.metadata
    }
    return dataclasses.replace(base, **moved)


def draw_knee(side: Side, rng: np.random.Generator) -> Knee:
    """A knee of a new patient."""
    cysts = tuple(
        (
            float(rng.uniform(-38, 38)),
            float(rng.uniform(-38, 30)),
            float(rng.uniform(0, 1)),
            float(rng.uniform(2, 5)),
        )
        for _ in range(int(rng.integers(0, 5)))
    )
    return dataclasses.replace(_draw(Knee(), rng), side=side, cysts=cysts)


def draw_sibling(knee: Knee, rng: np.random.Generator) -> Knee:
    """The patient's other knee: mirror-like, with small differences of its own."""
    other: Side = "left" if knee.side == "right" else "right"
    return dataclasses.replace(_draw(knee, rng, share=0.2), side=other)


def draw_visit(rng: np.random.Generator) -> Visit:
    """The conditions of one examination."""
    wedges = tuple((float(rng.uniform(0, 360)), float(rng.uniform(52, 68))) for _ in range(int(rng.integers(0, 4))))
    visit = dataclasses.replace(_draw(Visit(), rng), seed=int(rng.integers(2**31)), wedges=wedges)
    if rng.uniform() < 0.2:  # a visit in which fat is the brighter of the two
        return dataclasses.replace(visit, muscle=visit.fat, fat=visit.muscle)
    return visit


def _paint_limb(canvas: Canvas, knee: Knee, visit: Visit) -> None:
    """Skin, fat under it, and the paler fascia that wraps the muscles; alike on both sides."""
    everywhere = (slice(None), slice(None))
    axes = (knee.limb_width, knee.limb_height)
    skin = ellipse(canvas.x, canvas.y, (knee.limb_x, 0.0), axes)
    canvas.fill(everywhere, skin, visit.fat + 0.15)
    canvas.fill(everywhere, skin + np.float32(1.6), visit.fat)
    fascia = skin + np.float32(knee.skin_fat)
    canvas.fill(everywhere, np.abs(fascia) - np.float32(0.5), visit.fat * 0.5)


def _paint_muscles(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """The muscles around the femur: most of what tells the sides apart on the shaft."""
    down, head = smooth_step(level, 0.0, 1.0), smooth_step(level, 0.35, 0.8)
    m, seam, value = knee.muscle, visit.fat * 0.55, visit.muscle
    hx, hy = knee.hamstring_x, knee.hamstring_y

    def muscle(x: float, y: float, a: float, b: float, turn: float = 0.0, tone: float = 1.0) -> None:
        canvas.ellipse((x, y), (a * m, b * m), value * tone, turn=turn, seam=seam)

    s = 1 - smooth_step(level, 0.1, 0.4)
    muscle(0, 17, 21 * s, 8 * s, 0, 0.95)
    s = knee.vastus_medialis * mix(1.0, 0.25, smooth_step(level, 0.1, 0.75))
    muscle(-27 - 4 * down, 15 + 2 * down, 15 * s, 17 * s, -25, 1.05)
    s = knee.vastus_lateralis * mix(1.0, 0.2, smooth_step(level, 0.0, 0.6))
    muscle(27 + 6 * down, 12, 11 * s, 18 * s, 25, 0.95)
    s = knee.gastrocnemius * head
    muscle(-17 + hx, -33 + hy, 12 * s, 8 * s, 20, 1.1)
    muscle(16 + hx, -34 + hy, 8 * s, 6 * s, -15, 1.1)
    s = knee.semimembranosus * mix(1.0, 0.6, down)
    muscle(mix(-19, -30, down) + hx, mix(-27, -25, down) + hy, 14 * s, 10 * s, 25)
    s = knee.semitendinosus * mix(1.0, 0.6, down)
    muscle(mix(-15, -33, down) + hx, mix(-40, -34, down) + hy, 7 * s, 5.5 * s, 10, 0.9)
    s = knee.biceps * mix(1.0, 0.75, down)
    muscle(mix(26, 37, down) + hx, mix(-29, -21, down) + hy, 13 * s, 11 * s, -50)
    s = knee.gracilis * mix(1.0, 0.7, down)
    muscle(mix(-36, -40, down), mix(-27, -24, down) + hy, 4.5 * s, 4.5 * s, 0, 0.9)
    s = knee.sartorius * mix(1.0, 0.8, down)
    muscle(-45, -11 + hy * 0.5, 5 * s, 12 * s, -8)


def _paint_vessels(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """The popliteal artery, a bright ring, its vein, and the tibial nerve beside them."""
    x, y = knee.artery_x, mix(-27, -35, smooth_step(level, 0.0, 0.8)) + knee.artery_y
    canvas.ellipse((x + 1, y - 7), (4.2, 3.2), 0.65)
    canvas.ellipse((x - 3, y - 12), (2.6, 2.0), 0.4, seam=visit.fat * 0.5)
    canvas.ellipse((x, y), (3.8, 3.8), 0.95)
    canvas.ellipse((x, y), (2.4, 2.4), 0.12)


def _femur(x: Floats, y: Floats, knee: Knee, level: float) -> Floats:
    """Signed distance to the femur: a shaft that grows two unequal condyles, less the notch."""
    grow, back, split = smooth_step(level, 0.0, 0.65), smooth_step(level, 0.3, 0.8), smooth_step(level, 0.45, 0.9)
    shaft = ellipse(x, y, (0.0, 2.0), (knee.shaft + 5 * grow, knee.shaft - 1 + grow))
    lateral = ellipse(
        x,
        y,
        (mix(6, 19, grow), mix(3, 6, grow) - 8 * back),
        (mix(12, knee.lateral_width, grow), mix(14, knee.lateral_length - 8, grow) + 8 * back),
        knee.lateral_turn,
    )
    medial = ellipse(
        x,
        y,
        (mix(-5, -20, grow), mix(2, 2, grow) - 7 * back),
        (mix(11, knee.medial_width, grow), mix(13, knee.medial_length - 7, grow) + 7 * back),
        -knee.medial_turn * grow,
    )
    rise = mix(0.55, 1.0, grow) * knee.lateral_height
    facet = ellipse(x, y, (mix(7, 16, grow), mix(8, 15, grow) + rise), (13.0, 10.0), -25)
    bone = join(join(shaft, lateral, 5), join(medial, facet, 3), 5)
    if split > 0:
        tip = np.float32(mix(-26, 4, split))
        half = (tip - y) * np.float32(knee.notch_width / 30)
        notch = np.maximum(np.abs(x - np.float32(knee.notch_x)) - half, y - tip)
        bone = -join(-bone, notch, 4)
    return bone


def _paint_femur(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """Cartilage where the femur meets patella and tibia, dark cortex, marrow less dark."""
    where = canvas.window((0.0, -2.0), 46.0)
    x, y = canvas.x[where], canvas.y[where]
    bone = _femur(x, y, knee, level)
    trochlea = np.clip((y - np.float32(7)) * 0.2, 0, 1) * np.float32(smooth_step(level, 0.05, 0.3))
    behind = np.clip((np.float32(-8) - y) * 0.2, 0, 1) * np.float32(smooth_step(level, 0.45, 0.7))
    rim = bone - np.float32(knee.cartilage) * np.maximum(trochlea, behind)
    canvas.fill(where, rim, visit.cartilage)
    canvas.fill(where, bone, 0.05)
    grain = np.float32(0.03) * np.sin(x * 0.9 + knee.artery_x) * np.sin(y * 1.1 + 9 * level)
    canvas.fill(where, bone + np.float32(1.4), grain + np.float32(knee.marrow))


def _paint_patella(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """The patella: a longer lateral and a steeper medial facet, both under bright cartilage."""
    bulge = mix(0.72, 1.0, smooth_step(level, -0.1, 0.35)) * mix(1.0, 0.7, smooth_step(level, 0.65, 1.1))
    grow = smooth_step(level, 0.0, 0.65)
    center = (knee.patella_x, mix(31, 39, grow) + knee.patella_y)
    where = canvas.window(center, knee.patella_width + 6)
    c, s = math.cos(math.radians(knee.patella_turn)), math.sin(math.radians(knee.patella_turn))
    dx, dy = canvas.x[where] - center[0], canvas.y[where] - center[1]
    x, y = dx * np.float32(c) + dy * np.float32(s), dy * np.float32(c) - dx * np.float32(s)

    def body(rise: float) -> Floats:
        half, depth = knee.patella_width * bulge, knee.patella_depth * bulge
        oval = ellipse(x, y + np.float32(rise), (0.0, 0.0), (half, depth))
        over = x - np.float32(knee.patella_ridge)
        slope = np.where(over > 0, np.float32(0.32), np.float32(-0.75))
        facets = slope * over - (y + np.float32(rise + depth))
        closed: Floats = np.maximum(oval, facets * np.float32(0.85))
        return closed

    canvas.fill(where, body(-1.5) - np.float32(1.0), 0.1)
    middle = np.abs(x) - np.float32(0.85 * knee.patella_width * bulge)
    canvas.fill(where, np.maximum(body(knee.cartilage * 1.1), middle), visit.cartilage)
    bone = body(0.0)
    canvas.fill(where, bone, 0.05)
    canvas.fill(where, bone + np.float32(1.4), knee.marrow * 1.05)


def _paint_fluid(canvas: Canvas, knee: Knee, level: float) -> None:
    """Joint fluid on a random side of the patella, and cysts: bright, and no clue to the side."""
    reach = 25.0 * math.copysign(1, knee.effusion)
    size = 6.0 * abs(knee.effusion) * smooth_step(level, -0.2, 0.3) * smooth_step(1 - level, 0.0, 0.4)
    canvas.ellipse((reach, 31.0), (size * 1.8, size * 0.9), 0.95, turn=-40 * math.copysign(1, reach))
    for x, y, center, radius in knee.cysts:
        # A ball in millimeters: forty slices span about 60 mm, so a level is 60 mm long.
        square = radius**2 - (60.0 * (level - center)) ** 2
        if square > 0:
            canvas.ellipse((x, y), (math.sqrt(square), math.sqrt(square)), 1.0)


def _expose(canvas: Canvas, visit: Visit, level: float) -> Picture:
    """Brightness to 8 bits: gain, uneven field, noise, and the black wedges left by resampling."""
    u, v = canvas.u / np.float32(72), canvas.v / np.float32(63)
    field_ = (1 + visit.bias_x * u + visit.bias_r * u * u) + (visit.bias_y * v + visit.bias_r * v * v)
    rng = np.random.default_rng([visit.seed, round(level * 1_000_000)])
    noise = rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32) * np.float32(visit.noise)
    values = canvas.values * (field_ * np.float32(visit.gain * 255)) + noise * np.float32(255)
    for direction, distance in visit.wedges:
        c, s = math.cos(math.radians(direction)), math.sin(math.radians(direction))
        values *= canvas.u * np.float32(c) + canvas.v * np.float32(s) < distance
    # Steps of 4 grey levels lie below the noise, and save a third of the disk.
    coarse: Picture = np.clip(np.abs(values), 0, 255).astype(np.uint8) & np.uint8(0xFC)
    return coarse


def render(knee: Knee, visit: Visit = Visit(), level: float = 0.5) -> Picture:
    """One axial slice.

    Args:
        knee: the patient's shape, and the side.
        visit: turn, shift, contrast and noise of the examination.
        level: where the slice lies, 0 (shaft) to 1 (condyles).

    Returns:
        Grey levels, `HEIGHT x WIDTH` = 228 x 260, posterior at the top.

    Raises:
        ValueError: `level` outside [0, 1], or a side that is neither left nor right.

    Example:
        >>> right = Knee(side="right")
        >>> left = dataclasses.replace(right, side="left")
        >>> bool((render(left) == render(right)[:, ::-1]).all()), render(left).shape
        (True, (228, 260))
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level={level}: wanted a number from 0 (shaft) to 1 (condyles)")
    if knee.side not in get_args(Side):
        raise ValueError(f"side={knee.side!r}: wanted 'left' or 'right'")
    depth = 0.08 + 0.84 * level + knee.level_shift + visit.level_shift
    scale = (visit.zoom * knee.size * knee.width, visit.zoom * knee.size)
    canvas = Canvas(scale, (visit.shift_x, visit.shift_y), visit.turn)
    _paint_limb(canvas, knee, visit)
    _paint_muscles(canvas, knee, visit, depth)
    _paint_vessels(canvas, knee, visit, depth)
    _paint_femur(canvas, knee, visit, depth)
    _paint_fluid(canvas, knee, depth)
    _paint_patella(canvas, knee, visit, depth)
    picture = _expose(canvas, visit, level)
    return picture if knee.side == "right" else np.ascontiguousarray(picture[:, ::-1])
