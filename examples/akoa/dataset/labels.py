"""Rows of labels.csv: reading, writing, and the audit of their split.

The split is over patients: all knees of all visits of a patient are in the same part. For a cross-validation the
`split` column contains `fold0` to `fold<K-1>`; see `examples.akoa.dataset.splits.as_fold`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path, PurePosixPath

from examples.akoa.dataset import tables
from examples.akoa.dataset.file_names import SIDES, check_path, folder_sides, name_sides, parse_name
from examples.common.terminal import quoted
from perceiver_core.atomic_files import write_atomically

SPLITS = ("train", "val", "test")

_NUMBER = re.compile("[0-9]{1,9}"), "a whole number of at most 9 digits"
_FORMS = {
    "patient": (re.compile("[0-9]{7}"), "7 digits"),
    "visit": _NUMBER,
    "side": (re.compile("|".join(SIDES)), " or ".join(SIDES)),
    "slice": _NUMBER,
    "split": (re.compile("train|val|test|fold(?:0|[1-9][0-9]{0,8})"), "train, val, test or fold<i>"),
}


@dataclass(frozen=True)
class Row:
    """Line of labels.csv; `image` is a POSIX path relative to the data folder."""

    image: str
    patient: str
    visit: int
    side: str
    slice: int
    split: str


HEADER = tuple(field.name for field in fields(Row))


def find_leaks(assignments: Iterable[tuple[str, str]]) -> tuple[int, str]:
    """Find patients that are in more than one part of the split.

    Args:
        assignments: Patient and part of every image.

    Returns:
        Number of such patients, and a text that lists the first five.
    """
    parts: dict[str, set[str]] = defaultdict(set)
    for patient, part in assignments:
        parts[patient].add(part)
    leaks = sorted(patient for patient, names in parts.items() if len(names) > 1)
    return len(leaks), "; ".join(f"{p} in {' and '.join(sorted(parts[p]))}" for p in leaks[:5])


def audit_split(rows: Sequence[Row]) -> None:
    """Check a split before it is used for training.

    Raises:
        ValueError: A patient is in two parts, an image occurs twice, a part is empty, or folds are mixed with train,
            val and test.
    """
    leaks, shown = find_leaks((row.patient, row.split) for row in rows)
    if leaks:
        raise ValueError(
            f"{leaks} patients are in two parts of the split ({shown}): "
            "training would use patients of the test; split by patient with generate_labels"
        )
    twice = [image for image, n in Counter(row.image for row in rows).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} images occur twice in the labels, first {min(twice)!r}")
    actual = {row.split for row in rows}
    folds = actual - set(SPLITS)
    expected = {f"fold{i}" for i in range(max(3, len(folds)))} if folds else set(SPLITS)
    if actual != expected:
        raise ValueError(f"split contains {sorted(actual)}, need images in each of {sorted(expected)}")


def read_labels(path: str | Path) -> list[Row]:
    """Read labels.csv.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: The file is not a table in CSV format, or contains an invalid value, an image or a slice
            twice, or an image whose name or folder contradicts its labels; the message names the file and the line.
    """
    rows: list[Row] = []
    lines: dict[str | tuple[str, int, str, int], int] = {}
    for number, values in tables.read_table(Path(path), HEADER):
        try:
            row = _to_row(values)
            identity = row.patient, row.visit, row.side, row.slice
            if row.image in lines:
                raise ValueError(
                    f"image {quoted(row.image)} occurs twice, first in line {lines[row.image]}; remove one line"
                )
            if identity in lines:
                raise ValueError(
                    f"image {quoted(row.image)} has the patient, visit, side and slice of line {lines[identity]}; "
                    "remove one line"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        lines[row.image] = lines[identity] = number
        rows.append(row)
    if not rows:
        raise ValueError(
            f"{path}: the file is empty, or contains no images; write it with examples.akoa.generate_labels"
        )
    return rows


def to_csv(rows: Iterable[Row]) -> str:
    """Return the text of labels.csv."""
    return tables.to_csv(HEADER, (astuple(row) for row in rows))


def write_labels(path: Path, rows: Iterable[Row]) -> None:
    """Write labels.csv completely or not at all, with the same bytes on every system."""
    write_atomically({path: to_csv(rows)})


def _to_row(values: Mapping[str, str]) -> Row:
    """Convert the values of a line, and check that the path of the image does not contradict them."""
    check_path(values["image"])
    for column, (form, expected) in _FORMS.items():
        if not form.fullmatch(values[column]):
            raise ValueError(f"{column} is {quoted(values[column])}, need {expected}")
    row = Row(
        image=values["image"],
        patient=values["patient"],
        visit=int(values["visit"]),
        side=values["side"],
        slice=int(values["slice"]),
        split=values["split"],
    )
    _check_against_path(row)
    return row


def _check_against_path(row: Row) -> None:
    """Check that the folder of an image, and its name if it has the AKOA format, agree with the other columns."""
    for side in folder_sides(row.image) - {row.side}:
        raise ValueError(
            f"side is {row.side!r}, but the folder of {quoted(row.image)} is {side!r}; correct one of them"
        )
    try:
        name = parse_name(PurePosixPath(row.image).name)
    except ValueError:  # the labels of another data set
        for side in name_sides(row.image) - {row.side}:
            raise ValueError(
                f"side is {row.side!r}, but {side!r} in the name {quoted(row.image)}; correct one of them"
            ) from None
        return
    for column in ("patient", "visit", "side", "slice"):
        actual, expected = getattr(row, column), getattr(name, column)
        if actual != expected:
            raise ValueError(
                f"{column} is {actual!r}, but {expected!r} in the name {quoted(row.image)}; correct one of them"
            )
