"""Which pictures are alike though their labels say that they should not be.

Every picture is compared with every other, as it is and mirrored, by a gray thumbnail of each.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Integer, UInt8

from examples.akoa.labels import Problem, Row

THUMB = (56, 64)
"""Height and width of the grey thumbnails that are compared, in pixels."""

_COARSE = 0.85  # likeness of 14 x 16 pictures that is worth a closer look
_FINE = 0.7  # likeness of 56 x 64 pictures that makes a near-duplicate
_FLAT = 1.0  # gray levels: with a smaller RMS step between neighbors a picture shows nothing
_TILE = 2048  # pictures a side of one block of comparisons: 16 MB


def find_lookalikes(rows: Sequence[Row], thumbs: UInt8[np.ndarray, "n h w"]) -> list[Problem]:
    """Near-duplicates across the split, and pictures whose labels cannot both be right.

    `near-duplicates` stand in two parts of the split, as they are or mirrored: a leak.
    `contradicting` are one picture filed on both sides, or a picture and its mirror image filed on
    one side, whoever the patients are. Slices of one volume are never compared. Every picture
    concerned is listed with the one most like it: the list stays short even if all are the same.

    Args:
        rows: n labels.
        thumbs: their pictures in gray levels, in the same order, of the size `THUMB`.
    """
    split, side, volume = (
        _as_codes(keys)
        for keys in (
            [row.split for row in rows],
            [row.side for row in rows],
            [(row.patient, row.visit, row.side) for row in rows],
        )
    )
    same = np.zeros_like(side)
    problems = []
    for kind, mirrored, differ, equal in (
        ("near-duplicates", False, split, same),
        ("near-duplicates", True, split, same),
        ("contradicting", False, side, same),
        ("contradicting", True, volume, side),
    ):
        for i, j, likeness in similar_pairs(thumbs, differ, equal, mirrored=mirrored):
            a, b = rows[i], rows[j]
            detail = f"{'mirrored' if mirrored else 'as it is'}, likeness {likeness:.3f}: " + (
                f"{a.patient} {a.side} in {a.split}, {b.patient} {b.side} in {b.split}"
            )
            problems.append(Problem(kind, a.image, b.image, detail))
    return problems


def similar_pairs(
    thumbs: UInt8[np.ndarray, "n h w"],
    differ: Integer[np.ndarray, " n"],
    equal: Integer[np.ndarray, " n"],
    *,
    mirrored: bool,
) -> list[tuple[int, int, float]]:
    """Pairs of like pictures i < j with unlike `differ` and like `equal`: each one's closest.

    Likeness is the cosine of the steps between neighboring pixels, in [-1, 1], the same under gain
    and offset: first of 14 x 16 pictures, all against all, then of 56 x 64 for what passed.

    Args:
        thumbs: gray pictures, height and width multiples of 4.
        differ: codes of what must be different in a pair.
        equal: codes of what must be the same in a pair.
        mirrored: compare each picture with the mirror images of the others.
    """
    others = thumbs[:, :, ::-1] if mirrored else thumbs
    coarse, coarse_others = _steps(_shrink(thumbs)), _steps(_shrink(others))
    count = len(thumbs)
    best, partner = np.zeros(count, np.float32), np.zeros(count, np.int64)
    tiles = [slice(start, start + _TILE) for start in range(0, count, _TILE)]
    for a, b in ((a, b) for k, a in enumerate(tiles) for b in tiles[k:]):
        hit = coarse[a] @ coarse_others[b].T >= _COARSE
        hit &= (differ[a, None] != differ[b]) & (equal[a, None] == equal[b])
        rows, columns = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        if not len(rows):
            continue
        fine = _steps(thumbs[a][rows]) @ _steps(others[b][columns]).T
        fine[~hit[np.ix_(rows, columns)] | (fine < _FINE)] = 0
        _keep_best(best, partner, rows + a.start, columns + b.start, fine)
        _keep_best(best, partner, columns + b.start, rows + a.start, fine.T)
    found = [(i, int(partner[i])) for i in np.flatnonzero(best).tolist()]
    pairs = {(min(i, j), max(i, j)): float(best[i]) for i, j in found}
    return sorted((i, j, likeness) for (i, j), likeness in pairs.items())


def _as_codes(keys: Sequence[object]) -> Integer[np.ndarray, " n"]:
    codes: dict[object, int] = {}
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int32)


def _shrink(thumbs: UInt8[np.ndarray, "n h w"]) -> Float32[np.ndarray, "n h/4 w/4"]:
    count, height, width = thumbs.shape
    blocks = thumbs.reshape(count, height // 4, 4, width // 4, 4)
    means: Float32[np.ndarray, "n h/4 w/4"] = blocks.mean(axis=(2, 4), dtype=np.float32)
    return means


def _steps(pictures: np.ndarray) -> Float32[np.ndarray, "n d"]:
    """Unit vectors of the steps between neighboring pixels; zero for a flat picture, like none."""
    count, height, width = pictures.shape
    gray = pictures.astype(np.float32)
    across = np.diff(gray, axis=2).reshape(count, height * (width - 1))
    down = np.diff(gray, axis=1).reshape(count, (height - 1) * width)
    steps = np.concatenate([across, down], axis=1)
    norm = np.linalg.norm(steps, axis=1, keepdims=True)
    shows = norm > _FLAT * steps.shape[1] ** 0.5
    units: Float32[np.ndarray, "n d"] = steps * (shows / np.maximum(norm, 1e-6))
    return units


def _keep_best(
    best: Float32[np.ndarray, " n"],
    partner: Integer[np.ndarray, " n"],
    rows: Integer[np.ndarray, " r"],
    columns: Integer[np.ndarray, " c"],
    likeness: Float32[np.ndarray, "r c"],
) -> None:
    """Where a row is more like one of the columns than like its partner so far, change partners."""
    at = likeness.argmax(axis=1)
    value = likeness[np.arange(len(rows)), at]
    better = value > best[rows]
    best[rows[better]], partner[rows[better]] = value[better], columns[at[better]]
