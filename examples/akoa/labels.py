"""What an AKOA file name says, which files of a folder are pictures, and the rows of labels.csv.

Unusual here: nothing depends on the order in which a folder is listed or on the operating system.
Names are sorted by code point.

A *visit* is the number after `BaseLine`; it is not a patient. A *volume* is one patient, visit and
side, as a rule 40 slices. A split is over patients: all knees of all visits stay together.

With folds, the `split` column holds `fold0` to `fold<K-1>`; see `examples.akoa.splits.as_fold`.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path, PurePosixPath

SIDES = ("left", "right")
SPLITS = ("train", "val", "test")
FORM = "OAI<7 digits>_BaseLine_<n>[_]de3d1_SAG_3D_DESS_WE_<SIDE>.nii.gz_<k>.png"

# ASCII, because without it "ignore case" also lets the long s and the Kelvin sign pass for s and k.
_NAME = re.compile(
    r"OAI(?P<patient>[0-9]{7})_BaseLine_(?P<visit>[0-9]+)(?P<gap>_?)de3d1_SAG_3D_DESS_WE_"
    r"(?P<side>LEFT|L_E_F_T|RIGHT|R_I_G_H_T)\.nii\.gz_(?P<slice>[0-9]+)\.png",
    re.IGNORECASE | re.ASCII,
)
_JUNK = frozenset({"thumbs.db", ".ds_store", "desktop.ini"})
_SPLIT = re.compile(r"train|val|test|fold(?:0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Name:
    """What a file name says: `spelling` is the side as written, `underscore` the one of _de3d1."""

    patient: str
    visit: int
    side: str
    slice: int
    spelling: str
    underscore: bool


@dataclass(frozen=True)
class Picture:
    """A file: its POSIX path relative to the data folder, and what its name says."""

    image: str
    name: Name

    @property
    def volume(self) -> tuple[str, int, str]:
        """Patient, visit and side: what the slices of one scan share."""
        return self.name.patient, self.name.visit, self.name.side


@dataclass(frozen=True)
class Row:
    """A line of labels.csv; `image` is a POSIX path relative to the data folder."""

    image: str
    patient: str
    visit: int
    side: str
    slice: int
    split: str


HEADER = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Problem:
    """A finding of the audit about `image`, and about `other` where two files are concerned."""

    kind: str
    image: str
    other: str
    detail: str


@dataclass(frozen=True)
class Kind:
    """How to mend a kind of problem, and what becomes of the files when it is allowed."""

    mend: str
    allowed: str


KINDS: Mapping[str, Kind] = {
    "unparsed": Kind(f"rename the file to {FORM}, or move it away", "the file is left out"),
    "unreadable": Kind("unpack the file again from AKOA_Analysis.zip", "the file is left out"),
    "disagreeing": Kind("move the file to the folder of its side", "the file is left out"),
    "duplicates": Kind("delete one of the two files", "the first by path is kept, others left out"),
    "near-duplicates": Kind("find out whether two patients are one; delete a copy", "both are kept"),
    "contradicting": Kind("look at both pictures and correct the side of one", "both are kept"),
}


def parse_name(name: str) -> Name:
    """Read a file name, in any case and spelling.

    Raises:
        ValueError: the whole name is not of the form `FORM`, LEFT or RIGHT (or spaced, L_E_F_T).

    Example:
        >>> parse_name("OAI9000099_BaseLine_3de3d1_SAG_3D_DESS_WE_R_I_G_H_T.nii.gz_7.png").side
        'right'
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"name {name!r} is not of the form {FORM} with SIDE left or right")
    return Name(
        patient=found["patient"],
        visit=int(found["visit"]),
        side=found["side"].replace("_", "").lower(),
        slice=int(found["slice"]),
        spelling=found["side"],
        underscore=bool(found["gap"]),
    )


def is_junk(path: str) -> bool:
    """Whether a file is litter of an operating system (Thumbs.db, .DS_Store, ._*), not data."""
    name = PurePosixPath(path).name
    return name.lower() in _JUNK or name.startswith("._")


def must_parse(path: str) -> bool:
    """Whether a file claims to be a knee: a PNG, or any name with OAI in it; junk never does."""
    name = PurePosixPath(path).name.lower()
    return (name.endswith(".png") or "oai" in name) and not is_junk(path)


def list_files(root: Path) -> list[str]:
    """POSIX paths of all files under `root`, relative to it, sorted by code point.

    Upper case so comes before lower case on every system. Linked folders are followed, each real
    folder once.

    Raises:
        FileNotFoundError: `root` is not a folder.
        OSError: a folder below it cannot be listed; skipping it would lose patients in silence.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} does not exist or is not a folder")
    paths: list[str] = []
    seen: set[str] = set()
    for folder, below, files in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()  # with a folder linked twice, the same one of its names is met first
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(paths)


def sort_out(paths: Iterable[str]) -> tuple[list[Picture], list[str], list[Problem]]:
    """Sort files into pictures, ignored files, and problems (unparsed, disagreeing)."""
    pictures, ignored, problems = [], [], []
    for path in sorted(paths):
        if not must_parse(path):
            ignored.append(path)
            continue
        try:
            _check_path(path)
            picture = Picture(path, parse_name(PurePosixPath(path).name))
        except ValueError as error:
            problems.append(Problem("unparsed", path, "", str(error)))
            continue
        folders = {part.lower() for part in PurePosixPath(path).parts[:-1]} & set(SIDES)
        if folders - {picture.name.side}:
            detail = f"folder {'/'.join(sorted(folders))}, name {picture.name.spelling}"
            problems.append(Problem("disagreeing", path, "", detail))
        else:
            pictures.append(picture)
    return pictures, ignored, problems


def drop_duplicates(pictures: Iterable[Picture]) -> tuple[list[Picture], list[Problem]]:
    """Keep the first by path of the pictures with one patient, visit, side and slice."""
    first: dict[tuple[str, int, str, int], Picture] = {}
    problems = []
    for picture in sorted(pictures, key=lambda picture: picture.image):
        known = first.setdefault((*picture.volume, picture.name.slice), picture)
        if known is not picture:
            detail = "patient {}, visit {}, {}, slice {} stands in both".format(*picture.volume, picture.name.slice)
            problems.append(Problem("duplicates", picture.image, known.image, detail))
    return list(first.values()), problems


def patients_in_several(placed: Iterable[tuple[str, str]]) -> tuple[int, str]:
    """How many patients stand in more than one part, and the first five of them in words.

    Args:
        placed: patient and part, of every picture.
    """
    parts: dict[str, set[str]] = defaultdict(set)
    for patient, part in placed:
        parts[patient].add(part)
    leaks = sorted(patient for patient, found in parts.items() if len(found) > 1)
    return len(leaks), "; ".join(f"{p} in {' and '.join(sorted(parts[p]))}" for p in leaks[:5])


def audit_split(rows: Sequence[Row]) -> None:
    """Check a split before it is trained on.

    Raises:
        ValueError: a patient stands in two parts, an image stands twice, a part is empty, or folds
            are mixed with train, val and test.
    """
    leaks, shown = patients_in_several((row.patient, row.split) for row in rows)
    if leaks:
        raise ValueError(
            f"{leaks} patients stand in two parts of the split ({shown}): "
            "the test would see its own patients; split by patient with generate_labels"
        )
    twice = [image for image, n in Counter(row.image for row in rows).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} images stand twice in the labels, first {min(twice)!r}")
    found = {row.split for row in rows}
    folds = found - set(SPLITS)
    wanted = {f"fold{i}" for i in range(max(3, len(folds)))} if folds else set(SPLITS)
    if found != wanted:
        raise ValueError(f"split holds {sorted(found)}, need pictures in each of {sorted(wanted)}")


def read_labels(path: str | Path) -> list[Row]:
    """Read labels.csv.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, lacks a column, or holds an impossible value, in the line named.
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
    """Write labels.csv whole or not at all, the same bytes on every system."""
    write_table(path, HEADER, (astuple(row) for row in rows))


def write_table(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    r"""Write a CSV file (UTF-8, `\n`) beside `path`, then put it in its place in one step."""
    # Not from tempfile, which would leave the result readable by its owner only.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A name that is no valid text can only stand in the problems, where an escape will do.
        with beside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(lines)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    raise error


def _check_path(image: str) -> None:
    """Refuse what is no path inside the data folder on some system, or no text."""
    # A backslash and a drive are parts of a path on Windows only.
    outside = image.startswith("/") or ".." in image.split("/") or "\\" in image or image[1:2] == ":"
    if not image or outside or not image.isprintable():
        raise ValueError(
            f"image is {image!r}, need a POSIX path inside the data folder, "
            "without '..', backslash, drive or control characters"
        )


def _read_row(line: Mapping[str, str | None], where: str) -> Row:
    values = {column: line[column] or "" for column in HEADER}
    try:
        _check_path(values["image"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    checks = {
        "patient": (re.fullmatch("[0-9]{7}", values["patient"]), "7 digits"),
        "visit": (re.fullmatch("[0-9]+", values["visit"]), "a whole number"),
        "side": (values["side"] in SIDES, "left or right"),
        "slice": (re.fullmatch("[0-9]+", values["slice"]), "a whole number"),
        "split": (_SPLIT.fullmatch(values["split"]), "train, val, test or fold<i>"),
    }
    for column, (good, wanted) in checks.items():
        if not good:
            raise ValueError(f"{where}: {column} is {values[column]!r}, need {wanted}")
    return Row(
        image=values["image"],
        patient=values["patient"],
        visit=int(values["visit"]),
        side=values["side"],
        slice=int(values["slice"]),
        split=values["split"],
    )
