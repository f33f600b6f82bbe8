"""The split over patients, in three parts and in folds."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.akoa.dataset import splits
from examples.akoa.dataset.file_names import ImageFile, parse_name
from examples.akoa.dataset.labels import Row, audit_split

pytestmark = pytest.mark.no_shape_checks

THREE_WAY = {"train": 0.6, "val": 0.2, "test": 0.2}
SIDES_OF = st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(any)


def pictures_of(patients: int, visits: int = 1, slices: int = 1) -> list[ImageFile]:
    """Images of patients with a right knee, a left knee or both."""
    names = [
        f"OAI{patient:07}_BaseLine_{3 + visit}_de3d1_SAG_3D_DESS_WE_{side}.nii.gz_{k}.png"
        for patient in range(patients)
        for side in (("RIGHT",), ("LEFT",), ("RIGHT", "LEFT"))[patient % 3]
        for visit in range(visits)
        for k in range(slices)
    ]
    return [ImageFile(name, parse_name(name)) for name in names]


def parts_of(rows: Iterable[Row]) -> dict[str, set[str]]:
    parts = defaultdict(set)
    for row in rows:
        parts[row.patient].add(row.split)
    return parts


def test_split_is_60_20_20_and_no_part_is_empty() -> None:
    """An unreachable branch once gave 80/0/20 and an empty file."""
    sizes = splits.split_sizes(101, THREE_WAY)
    assert sizes == {"train": 61, "val": 20, "test": 20}
    rows = splits.make_rows(pictures_of(101), THREE_WAY, seed=0)
    parts = parts_of(rows)
    assert {s: sum(actual == {s} for actual in parts.values()) for s in sizes} == sizes


def test_split_has_a_seed() -> None:
    pictures = pictures_of(23)
    first, again, other = (splits.make_rows(pictures, THREE_WAY, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_split_is_by_patient_and_not_by_image() -> None:
    rows = splits.make_rows(pictures_of(7, visits=2, slices=3), THREE_WAY, seed=0)
    assert all(len(actual) == 1 for actual in parts_of(rows).values())
    audit_split(rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(SIDES_OF, min_size=3, max_size=47), st.integers(), st.integers(0, 99))
def test_any_number_of_patients_splits_within_one(counts: list[tuple[int, int]], seed: int, shuffle: int) -> None:
    pictures = {f"{i:07}": count for i, count in enumerate(counts)}
    split = splits.split_patients(pictures, THREE_WAY, seed)
    assert split.keys() == pictures.keys()
    for part, share in THREE_WAY.items():
        held = sum(actual == part for actual in split.values())
        assert held >= 1
        assert abs(held - share * len(counts)) <= 1
    mixed = list(pictures.items())
    random.Random(shuffle).shuffle(mixed)
    assert splits.split_patients(dict(mixed), THREE_WAY, seed) == split


@settings(max_examples=20, deadline=None)
@given(st.lists(SIDES_OF, min_size=7, max_size=41), st.integers(3, 7), st.integers())
def test_folds_share_every_stratum(counts: list[tuple[int, int]], folds: int, seed: int) -> None:
    pictures = {f"{i:07}": count for i, count in enumerate(counts)}
    split = splits.split_patients(pictures, splits.k_fold(folds), seed)
    sizes = splits.split_sizes(len(counts), splits.k_fold(folds))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for stratum in ((True, False), (False, True), (True, True)):
        inside = [p for p, count in pictures.items() if tuple(n > 0 for n in count) == stratum]
        for part, size in sizes.items():
            held = sum(split[p] == part for p in inside)
            assert abs(held - len(inside) * size / len(counts)) < 2


@settings(max_examples=15, deadline=None)
@given(st.permutations(pictures_of(11, slices=2)))
def test_any_order_of_the_files_gives_the_same_rows(pictures: Sequence[ImageFile]) -> None:
    rows = splits.make_rows(pictures, THREE_WAY, seed=5)
    assert rows == splits.make_rows(pictures_of(11, slices=2), THREE_WAY, seed=5)
    assert [row.image for row in rows] == sorted(picture.path for picture in pictures)


def test_sides_are_balanced_over_the_split() -> None:
    rng = random.Random(3)
    pictures = {f"{i:07}": (rng.choice((0, 40, 200)), rng.choice((0, 80, 240)) or 40) for i in range(101)}
    total = sum(right for _, right in pictures.values()) / sum(map(sum, pictures.values()))
    split = splits.split_patients(pictures, THREE_WAY, seed=0)
    for part in THREE_WAY:
        held = [pictures[p] for p, actual in split.items() if actual == part]
        assert abs(sum(r for _, r in held) / sum(map(sum, held)) - total) < 0.03


def test_the_split_never_changes() -> None:
    """Labels of one seed are compared between machines and versions: these must never move."""
    split = splits.split_patients({f"{i:07}": (i % 3, 1) for i in range(7)}, THREE_WAY, seed=0)
    assert [split[p] for p in sorted(split)] == [
        "val",
        "test",
        "train",
        "train",
        "train",
        "val",
        "train",
    ]


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("patients", "fractions", "message"),
    [
        (2, (0.6, 0.2, 0.2), "got 2 patients, too few for 3 parts"),
        (9, (0.6, 0.2, 0.3), "add to 1.1, not 1"),
        (9, (0.8, 0.0, 0.2), "must be above 0"),
        (9, (0.8, float("nan"), 0.2), "must be above 0"),
        (9, (0.5, 0.5), "got 2 numbers"),
    ],
)
def test_impossible_splits_raise(patients: int, fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splits.split_sizes(patients, splits.three_way(fractions))


def test_tiny_fractions_still_get_a_patient() -> None:
    assert splits.split_sizes(3, splits.three_way((0.98, 0.01, 0.01))) == dict.fromkeys(THREE_WAY, 1)


@pytest.mark.refusal
def test_two_folds_raise() -> None:
    with pytest.raises(ValueError, match="need 3"):
        splits.k_fold(2)


def test_each_fold_is_tested_once_and_validated_once() -> None:
    rows = splits.make_rows(pictures_of(7), splits.k_fold(5), seed=0)
    runs = [splits.as_fold(rows, fold) for fold in range(5)]
    for i, row in enumerate(rows):
        roles = [run[i].split for run in runs]
        fold = int(row.split.removeprefix("fold"))
        assert (roles[fold], roles[fold - 1]) == ("test", "val")
        assert sorted(roles) == ["test", "train", "train", "train", "val"]
    with pytest.raises(ValueError, match="fold 5 is not among the 5 folds"):
        splits.as_fold(rows, 5)
    with pytest.raises(ValueError, match="fold 0 is not among the 0 folds"):
        splits.as_fold(splits.make_rows(pictures_of(7), THREE_WAY, seed=0), 0)
