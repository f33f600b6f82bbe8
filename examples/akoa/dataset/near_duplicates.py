"""Near-duplicate images that contradict the split or their labels.

Every image is compared with every other, as it is and mirrored, by a gray thumbnail of each.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Integer, UInt8

from examples.akoa.dataset.file_names import Problem
from examples.akoa.dataset.labels import Row

THUMBNAIL_SIZE = (56, 64)
"""Height and width of the compared gray thumbnails, in pixels."""

_COARSE_THRESHOLD = 0.85  # least similarity of 14 x 16 images for the comparison of 56 x 64 images
_FINE_THRESHOLD = 0.7  # least similarity of 56 x 64 images that makes a near-duplicate
_MIN_CONTRAST = 1.0  # gray levels; an image with a smaller RMS difference between neighboring pixels is uniform
_TILE_SIZE = 2048  # images along each axis of a block of comparisons, which takes 16 MB


def find_near_duplicates(rows: Sequence[Row], thumbnails: UInt8[np.ndarray, "n h w"]) -> list[Problem]:
    """Find near-duplicates across the split, and images whose labels cannot both be correct.

    Problems of the kind `near-duplicates` are two similar images in different parts of the split, as they are or
    mirrored, which is a leak. Problems of the kind `contradicting` are one image labeled with both sides, or an image
    and its mirror image labeled with the same side, of any patients. Slices of one volume are never compared. Each
    image concerned is listed with the one most similar to it, so the list stays short even if all images are the same.

    Args:
        rows: Labels of n images.
        thumbnails: Their images in gray levels, in the same order, of the size `THUMBNAIL_SIZE`.
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
        for i, j, similarity in similar_pairs(thumbnails, differ, equal, mirrored=mirrored):
            a, b = rows[i], rows[j]
            detail = f"{'mirrored' if mirrored else 'as it is'}, likeness {similarity:.3f}: " + (
                f"{a.patient} {a.side} in {a.split}, {b.patient} {b.side} in {b.split}"
            )
            problems.append(Problem(kind, a.image, b.image, detail))
    return problems


def similar_pairs(
    thumbnails: UInt8[np.ndarray, "n h w"],
    differ: Integer[np.ndarray, " n"],
    equal: Integer[np.ndarray, " n"],
    *,
    mirrored: bool,
) -> list[tuple[int, int, float]]:
    """Find the most similar partner of each image, among those that differ in `differ` and agree in `equal`.

    The similarity is the cosine between the differences of neighboring pixels, in [-1, 1], which does not depend on
    gain and offset. All images are compared at 14 x 16 pixels, and pairs above a threshold again at 56 x 64.

    Args:
        thumbnails: Gray images whose height and width are multiples of 4.
        differ: Codes of the property that must be different in a pair.
        equal: Codes of the property that must be the same in a pair.
        mirrored: Compare each image with the mirror images of the others.

    Returns:
        Indices i < j and the similarity of each pair above the thresholds, sorted.
    """
    others = thumbnails[:, :, ::-1] if mirrored else thumbnails
    coarse, coarse_others = _gradients(_downsample(thumbnails)), _gradients(_downsample(others))
    count = len(thumbnails)
    best, partner = np.zeros(count, np.float32), np.zeros(count, np.int64)
    tiles = [slice(start, start + _TILE_SIZE) for start in range(0, count, _TILE_SIZE)]
    for a, b in ((a, b) for k, a in enumerate(tiles) for b in tiles[k:]):
        hit = coarse[a] @ coarse_others[b].T >= _COARSE_THRESHOLD
        hit &= (differ[a, None] != differ[b]) & (equal[a, None] == equal[b])
        rows, columns = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        if not len(rows):
            continue
        fine = _gradients(thumbnails[a][rows]) @ _gradients(others[b][columns]).T
        fine[~hit[np.ix_(rows, columns)] | (fine < _FINE_THRESHOLD)] = 0
        _keep_best(best, partner, rows + a.start, columns + b.start, fine)
        _keep_best(best, partner, columns + b.start, rows + a.start, fine.T)
    indices = [(i, int(partner[i])) for i in np.flatnonzero(best).tolist()]
    pairs = {(min(i, j), max(i, j)): float(best[i]) for i, j in indices}
    return sorted((i, j, similarity) for (i, j), similarity in pairs.items())


def _as_codes(keys: Sequence[object]) -> Integer[np.ndarray, " n"]:
    """Integer code of each key; equal keys have equal codes."""
    codes: dict[object, int] = {}
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int32)


def _downsample(thumbnails: UInt8[np.ndarray, "n h w"]) -> Float32[np.ndarray, "n h/4 w/4"]:
    """Average blocks of 4 x 4 pixels."""
    count, height, width = thumbnails.shape
    blocks = thumbnails.reshape(count, height // 4, 4, width // 4, 4)
    return blocks.mean(axis=(2, 4), dtype=np.float32)


def _gradients(images: np.ndarray) -> Float32[np.ndarray, "n d"]:
    """Differences of neighboring pixels as unit vectors; zero for a uniform image, which is then similar to none."""
    count, height, width = images.shape
    gray = images.astype(np.float32)
    across = np.diff(gray, axis=2).reshape(count, height * (width - 1))
    down = np.diff(gray, axis=1).reshape(count, (height - 1) * width)
    gradients = np.concatenate([across, down], axis=1)
    norm = np.linalg.norm(gradients, axis=1, keepdims=True)
    has_contrast = norm > _MIN_CONTRAST * gradients.shape[1] ** 0.5
    return gradients * (has_contrast / np.maximum(norm, 1e-6))


def _keep_best(
    best: Float32[np.ndarray, " n"],
    partner: Integer[np.ndarray, " n"],
    rows: Integer[np.ndarray, " r"],
    columns: Integer[np.ndarray, " c"],
    similarity: Float32[np.ndarray, "r c"],
) -> None:
    """Update `best` and `partner` of each row that is more similar to one of the columns."""
    at = similarity.argmax(axis=1)
    value = similarity[np.arange(len(rows)), at]
    better = value > best[rows]
    best[rows[better]], partner[rows[better]] = value[better], columns[at[better]]
