"""Similar images in different parts of the split or with different labels."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from examples.akoa.dataset import near_duplicates
from examples.akoa.dataset.labels import SPLITS, Row
from tests.akoa.dataset_cases import HEIGHT, WIDTH, draw

pytestmark = pytest.mark.no_shape_checks


def look(*pairs: tuple[Row, np.ndarray]) -> list[tuple[str, str, str]]:
    size = near_duplicates.THUMBNAIL_SIZE[::-1]
    thumbs = [np.asarray(Image.fromarray(gray).resize(size)) for _, gray in pairs]
    actual = near_duplicates.find_near_duplicates([row for row, _ in pairs], np.stack(thumbs))
    return [(p.kind, p.image, p.other) for p in actual]


def row_of(image: str, patient: int, side: str, split: str, visit: int = 1) -> Row:
    return Row(image, f"{patient:07}", visit, side, 0, split)


@pytest.mark.parametrize("change", [lambda g: g, lambda g: g // 2 + 31, lambda g: np.roll(g, 1, 1)])
@pytest.mark.parametrize(
    ("mirrored", "side", "kinds"),
    [
        (False, "left", {"near-duplicates"}),
        (False, "right", {"near-duplicates", "contradicting"}),
        (True, "right", {"near-duplicates"}),
        (True, "left", {"near-duplicates", "contradicting"}),
    ],
)
def test_copies_across_the_split_are_found(
    change: Callable[[np.ndarray], np.ndarray], mirrored: bool, side: str, kinds: set[str]
) -> None:
    copy = change(draw(1)[:, ::-1] if mirrored else draw(1)).astype(np.uint8)
    a, b = row_of("a", 1, "left", "train"), row_of("b", 2, side, "test")
    others = [(row_of(f"c{k}", 10 + k, "left", "val"), draw(10 + k)) for k in range(13)]
    actual = look((a, draw(1)), *others, (b, copy))
    assert sorted(actual) == sorted((kind, "a", "b") for kind in kinds)


def test_copies_in_one_part_are_found_only_if_they_contradict() -> None:
    a = (row_of("a", 1, "left", "train"), draw(1))
    assert look(a, (row_of("b", 1, "left", "train"), draw(1))) == []
    assert look(a, (row_of("b", 2, "left", "train"), draw(1))) == []
    mirror = draw(1)[:, ::-1]
    assert look(a, (row_of("b", 1, "right", "train"), mirror)) == []
    assert look(a, (row_of("b", 1, "left", "train"), mirror)) == []
    contradiction = [("contradicting", "a", "b")]
    assert look(a, (row_of("b", 1, "right", "train"), draw(1))) == contradiction
    assert look(a, (row_of("b", 1, "left", "train", visit=2), mirror)) == contradiction


def test_flat_images_are_like_none() -> None:
    black = np.zeros((HEIGHT, WIDTH), np.uint8)
    assert look(*((row_of(s, i, "left", s), black) for i, s in enumerate(SPLITS))) == []


def test_the_list_of_copies_is_not_quadratic() -> None:
    rows = [row_of(f"{i:02}", i, "left", ("train", "test")[i % 2]) for i in range(29)]
    whole = look(*((row, draw(1)) for row in rows))
    assert len(whole) < len(rows)
    assert {image for _, *pair in whole for image in pair} == {row.image for row in rows}


def test_tiles_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(f"{i:02}", i, "left", ("train", "test")[i % 2]) for i in range(29)]
    pictures = [draw(i) for i in range(29)]
    pictures[1], pictures[28], pictures[12] = pictures[22], pictures[3], pictures[11]
    whole = look(*zip(rows, pictures, strict=True))
    assert [pair for _, *pair in whole] == [["01", "22"], ["03", "28"], ["11", "12"]]
    monkeypatch.setattr(near_duplicates, "_TILE_SIZE", 5)
    assert look(*zip(rows, pictures, strict=True)) == whole
