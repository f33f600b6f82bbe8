"""Axial slices of the phantom: the knee of `anatomy.Knee` as an examination of `anatomy.Visit` shows it.

Every slice is drawn as a right knee in millimeters, and a left knee is that image reversed, so the mirror image of a
phantom knee is exactly a knee of the other side. The side is thus visible in the anatomy of every slice, and nowhere
else. The task is hard for a model that only compares pixels: knees rotate by up to 17 degrees, shift by up to 7 mm,
differ in the size of every part, and their muscles may be darker or brighter than fat.

Coordinates of the limb: millimeters, origin in the femur, x to the right of the image (lateral in a right knee), y down
(anterior). A level in [0, 1] runs from the femoral shaft to the condyles.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import numpy.typing as npt

from examples.akoa.phantom.anatomy import Knee, Side, Visit
from examples.akoa.phantom.canvas import HEIGHT, WIDTH, Canvas, Floats, ellipse, mix, smooth_step, smooth_union

GrayImage = npt.NDArray[np.uint8]
AVERAGE_VISIT = Visit()


def _paint_limb(canvas: Canvas, knee: Knee, visit: Visit) -> None:
    """Paint skin, subcutaneous fat and the brighter fascia around the muscles; these are symmetric."""
    whole_image = (slice(None), slice(None))
    axes = (knee.limb_width, knee.limb_height)
    skin = ellipse(canvas.x, canvas.y, (knee.limb_x, 0.0), axes)
    canvas.fill(whole_image, skin, visit.fat + 0.15)
    canvas.fill(whole_image, skin + np.float32(1.6), visit.fat)
    fascia = skin + np.float32(knee.skin_fat)
    canvas.fill(whole_image, np.abs(fascia) - np.float32(0.5), visit.fat * 0.5)


def _paint_muscles(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """Paint the muscles around the femur, which distinguish the sides on the shaft."""
    down, head = smooth_step(level, 0.0, 1.0), smooth_step(level, 0.35, 0.8)
    m, outline, value = knee.muscle, visit.fat * 0.55, visit.muscle
    hx, hy = knee.hamstring_x, knee.hamstring_y

    def muscle(x: float, y: float, a: float, b: float, turn: float = 0.0, tone: float = 1.0) -> None:
        canvas.ellipse((x, y), (a * m, b * m), value * tone, turn=turn, outline=outline)

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
    """Paint the popliteal artery as a bright ring, its vein, and the tibial nerve."""
    x, y = knee.artery_x, mix(-27, -35, smooth_step(level, 0.0, 0.8)) + knee.artery_y
    canvas.ellipse((x + 1, y - 7), (4.2, 3.2), 0.65)
    canvas.ellipse((x - 3, y - 12), (2.6, 2.0), 0.4, outline=visit.fat * 0.5)
    canvas.ellipse((x, y), (3.8, 3.8), 0.95)
    canvas.ellipse((x, y), (2.4, 2.4), 0.12)


def _femur(x: Floats, y: Floats, knee: Knee, level: float) -> Floats:
    """Signed distance to the femur: a shaft that widens to two unequal condyles, less the notch."""
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
    bone = smooth_union(smooth_union(shaft, lateral, 5), smooth_union(medial, facet, 3), 5)
    if split > 0:
        tip = np.float32(mix(-26, 4, split))
        half = (tip - y) * np.float32(knee.notch_width / 30)
        notch = np.maximum(np.abs(x - np.float32(knee.notch_x)) - half, y - tip)
        bone = -smooth_union(-bone, notch, 4)
    return bone


def _paint_femur(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """Paint cartilage where the femur meets patella and tibia, dark cortex, and brighter marrow."""
    window = canvas.window((0.0, -2.0), 46.0)
    x, y = canvas.x[window], canvas.y[window]
    bone = _femur(x, y, knee, level)
    trochlea = np.clip((y - np.float32(7)) * 0.2, 0, 1) * np.float32(smooth_step(level, 0.05, 0.3))
    behind = np.clip((np.float32(-8) - y) * 0.2, 0, 1) * np.float32(smooth_step(level, 0.45, 0.7))
    rim = bone - np.float32(knee.cartilage) * np.maximum(trochlea, behind)
    canvas.fill(window, rim, visit.cartilage)
    canvas.fill(window, bone, 0.05)
    grain = np.float32(0.03) * np.sin(x * 0.9 + knee.artery_x) * np.sin(y * 1.1 + 9 * level)
    canvas.fill(window, bone + np.float32(1.4), grain + np.float32(knee.marrow))


def _paint_patella(canvas: Canvas, knee: Knee, visit: Visit, level: float) -> None:
    """Paint the patella: a longer lateral and a steeper medial facet, both under bright cartilage."""
    bulge = mix(0.72, 1.0, smooth_step(level, -0.1, 0.35)) * mix(1.0, 0.7, smooth_step(level, 0.65, 1.1))
    grow = smooth_step(level, 0.0, 0.65)
    center = (knee.patella_x, mix(31, 39, grow) + knee.patella_y)
    window = canvas.window(center, knee.patella_width + 6)
    c, s = math.cos(math.radians(knee.patella_turn)), math.sin(math.radians(knee.patella_turn))
    dx, dy = canvas.x[window] - center[0], canvas.y[window] - center[1]
    x, y = dx * np.float32(c) + dy * np.float32(s), dy * np.float32(c) - dx * np.float32(s)

    def body(rise: float) -> Floats:
        half, depth = knee.patella_width * bulge, knee.patella_depth * bulge
        oval = ellipse(x, y + np.float32(rise), (0.0, 0.0), (half, depth))
        over = x - np.float32(knee.patella_ridge)
        slope = np.where(over > 0, np.float32(0.32), np.float32(-0.75))
        facets = slope * over - (y + np.float32(rise + depth))
        return np.maximum(oval, facets * np.float32(0.85))

    canvas.fill(window, body(-1.5) - np.float32(1.0), 0.1)
    middle = np.abs(x) - np.float32(0.85 * knee.patella_width * bulge)
    canvas.fill(window, np.maximum(body(knee.cartilage * 1.1), middle), visit.cartilage)
    bone = body(0.0)
    canvas.fill(window, bone, 0.05)
    canvas.fill(window, bone + np.float32(1.4), knee.marrow * 1.05)


def _paint_fluid(canvas: Canvas, knee: Knee, level: float) -> None:
    """Paint joint fluid on a random side of the patella, and cysts: bright, and independent of the side."""
    reach = 25.0 * math.copysign(1, knee.effusion)
    size = 6.0 * abs(knee.effusion) * smooth_step(level, -0.2, 0.3) * smooth_step(1 - level, 0.0, 0.4)
    canvas.ellipse((reach, 31.0), (size * 1.8, size * 0.9), 0.95, turn=-40 * math.copysign(1, reach))
    for x, y, center, radius in knee.cysts:
        # A cyst is a ball in millimeters: forty slices span about 60 mm, so a level is 60 mm long.
        square = radius**2 - (60.0 * (level - center)) ** 2
        if square > 0:
            canvas.ellipse((x, y), (math.sqrt(square), math.sqrt(square)), 1.0)


def _expose(canvas: Canvas, visit: Visit, level: float) -> GrayImage:
    """Convert brightness to 8 bits, with gain, uneven field, noise, and the black wedges left by resampling."""
    u, v = canvas.u / np.float32(72), canvas.v / np.float32(63)
    field_ = (1 + visit.bias_x * u + visit.bias_r * u * u) + (visit.bias_y * v + visit.bias_r * v * v)
    rng = np.random.default_rng([visit.seed, round(level * 1_000_000)])
    noise = rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32) * np.float32(visit.noise)
    values = canvas.values * (field_ * np.float32(visit.gain * 255)) + noise * np.float32(255)
    for direction, distance in visit.wedges:
        c, s = math.cos(math.radians(direction)), math.sin(math.radians(direction))
        values *= canvas.u * np.float32(c) + canvas.v * np.float32(s) < distance
    # Steps of 4 gray levels are smaller than the noise, and save a third of the disk space.
    return np.clip(np.abs(values), 0, 255).astype(np.uint8) & np.uint8(0xFC)


def render(knee: Knee, visit: Visit = AVERAGE_VISIT, level: float = 0.5) -> GrayImage:
    """Render one axial slice.

    Args:
        knee: Shape and side of the knee.
        visit: Conditions of the examination.
        level: Position of the slice, from 0 (shaft) to 1 (condyles).

    Returns:
        Gray levels, `HEIGHT x WIDTH` = 228 x 260, posterior at the top.

    Raises:
        ValueError: `level` is outside [0, 1], or the side is neither left nor right.

    Example:
        >>> import dataclasses
        >>> right = Knee(side="right")
        >>> left = dataclasses.replace(right, side="left")
        >>> bool((render(left) == render(right)[:, ::-1]).all()), render(left).shape
        (True, (228, 260))
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level={level}: expected a number from 0 (shaft) to 1 (condyles)")
    if knee.side not in get_args(Side):
        raise ValueError(f"side={knee.side!r}: expected 'left' or 'right'")
    depth = 0.08 + 0.84 * level + knee.level_shift + visit.level_shift
    scale = (visit.zoom * knee.size * knee.width, visit.zoom * knee.size)
    canvas = Canvas(scale, (visit.shift_x, visit.shift_y), visit.turn)
    _paint_limb(canvas, knee, visit)
    _paint_muscles(canvas, knee, visit, depth)
    _paint_vessels(canvas, knee, visit, depth)
    _paint_femur(canvas, knee, visit, depth)
    _paint_fluid(canvas, knee, depth)
    _paint_patella(canvas, knee, visit, depth)
    image = _expose(canvas, visit, level)
    return image if knee.side == "right" else np.ascontiguousarray(image[:, ::-1])
