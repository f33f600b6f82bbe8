"""Rows of labels.csv: reading, writing, and the audit of their split.

The split is over patients: all knees of all visits of a patient are in the same part. For a cross-validation the
`split` column contains `fold0` to `fold<K-1>`; see `examples.akoa.dataset.splits.as_fold`.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from examples.akoa.dataset.file_names import SIDES, check_path

SPLITS = ("train", "val", "test")

_SPLIT = re.compile(r"train|val|test|fold(?:0|[1-9][0-9]*)")


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
        FileNotFoundError: The file does not exist.
        ValueError: The file is empty, lacks a column, or contains an invalid value; the message names the line.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        missing = [column for column in HEADER if column not in columns]
        if columns and missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing, need {','.join(HEADER)}")
        rows = [_read_row(line, f"{path}, line {reader.line_num}") for line in reader]
    if not rows:
        raise ValueError(f"{path}: the file is empty; write it with examples.akoa.generate_labels")
    return rows


def write_labels(path: Path, rows: Iterable[Row]) -> None:
    """Write labels.csv completely or not at all, with the same bytes on every system."""
    write_table(path, HEADER, (astuple(row) for row in rows))


def write_table(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    r"""Write a CSV file (UTF-8, `\n`) to a temporary file in the same folder, then rename it."""
    # Not with tempfile, whose files only their owner can read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Only the table of problems can contain names that are not valid text; there an escape suffices.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(lines)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_row(line: Mapping[str, str | None], where: str) -> Row:
    values = {column: line[column] or "" for column in HEADER}
    try:
        check_path(values["image"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    checks = {
        "patient": (re.fullmatch("[0-9]{7}", values["patient"]), "7 digits"),
        "visit": (re.fullmatch("[0-9]+", values["visit"]), "a whole number"),
        "side": (values["side"] in SIDES, "left or right"),
        "slice": (re.fullmatch("[0-9]+", values["slice"]), "a whole number"),
        "split": (_SPLIT.fullmatch(values["split"]), "train, val, test or fold<i>"),
    }
    for column, (valid, expected) in checks.items():
        if not valid:
            raise ValueError(f"{where}: {column} is {values[column]!r}, need {expected}")
    return Row(
        image=values["image"],
        patient=values["patient"],
        visit=int(values["visit"]),
        side=values["side"],
        slice=int(values["slice"]),
        split=values["split"],
    )
