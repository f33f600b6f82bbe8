"""Damaged labels.csv files, which are read as they are written or refused with an error that names the file."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from examples.akoa.dataset.file_names import SIDES, parse_name
from examples.akoa.dataset.labels import HEADER, Row, audit_split, read_labels, to_csv
from tests.akoa.dataset_cases import file_name

NAME = "labels.csv"
_SPELLINGS = ("LEFT", "L_E_F_T", "RIGHT", "R_I_G_H_T")
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252")
_INSERTED = (
    '"',
    '""',
    ",",
    "\n",
    "\r",
    "\r\n",
    "\0",
    "..",
    "/",
    "\\",
    "é",
    "\u202e",
    "\x1b[2J",
    "=",
    " ",
    "\ufeff",
    "9" * 5_000,
    "a" * 140_000,
)


def run_case(seed: int, folder: Path) -> str:
    """Damage labels and read them. Raises AssertionError if the result or the error is not as documented."""
    rng = np.random.default_rng(seed)
    rows = undamaged(rng)
    content = to_csv(rows).encode()
    damages = [_DAMAGES[rng.integers(len(_DAMAGES))] for _ in range(rng.integers(1, 4))] if rng.random() < 0.95 else []
    for damage in damages:
        content = damage(content, rng)
    path = folder / NAME
    path.write_bytes(content)
    try:
        actual = read_labels(path)
    except (ValueError, OSError) as error:
        assert damages, f"undamaged labels are refused: {error}"
        assert not isinstance(error, UnicodeError | csv.Error), repr(error)
        assert NAME in str(error), str(error)
        assert str(error).isprintable(), str(error)[:1000]
        assert len(str(error)) < 2000, str(error)[:1000]
        assert ", line " in str(error) or "is empty" in str(error), str(error)
        return "refused"
    if not damages:
        assert actual == rows
    _check(actual)
    return "read" if damages else "undamaged"


def undamaged(rng: np.random.Generator) -> list[Row]:
    """Return rows of a small data set, some with other names of files."""
    rows = []
    for patient in range(int(rng.integers(3, 9))):
        split = ("train", "val", "test")[patient % 3]
        for k in range(int(rng.integers(1, 5))):
            spelling = _SPELLINGS[rng.integers(4)]
            side = spelling.replace("_", "").lower()
            name = file_name(patient, 3, spelling, k) if rng.random() < 0.9 else f"knee,{patient} {k}.png"
            rows.append(Row(f"{side}/{name}" if rng.integers(2) else name, f"{patient:07}", 3, side, k, split))
    return rows


def _check(rows: list[Row]) -> None:
    """Check the properties of rows that training relies on."""
    assert rows
    assert len({row.image for row in rows}) == len(rows)
    for row in rows:
        assert row.side in SIDES
        assert min(row.visit, row.slice) >= 0
        assert row.image.isprintable()
        assert ".." not in row.image.split("/")
        try:
            name = parse_name(row.image.rsplit("/", 1)[-1])
        except ValueError:
            continue
        assert (name.patient, name.visit, name.side, name.slice) == (row.patient, row.visit, row.side, row.slice)
    try:
        audit_split(rows)
    except ValueError as error:
        assert "split" in str(error), error


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(content), int(rng.integers(1, 5)))):
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content) + 1)]


def _insert(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(content) + 1))
    return content[:at] + _INSERTED[rng.integers(len(_INSERTED))].encode() + content[at:]


def _random(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(content) + 1))
    return content[:at] + rng.bytes(int(rng.integers(0, 40))) if rng.integers(4) else b""


def _encode(content: bytes, rng: np.random.Generator) -> bytes:
    text = content.decode("utf-8", "replace").replace("knee", "genou droit é")
    return text.encode(_ENCODINGS[rng.integers(len(_ENCODINGS))], "replace")


def _edit_lines(content: bytes, rng: np.random.Generator) -> bytes:
    """Duplicate, remove, empty or repeat lines, or change line ends."""
    lines = content.split(b"\n")
    at = int(rng.integers(len(lines)))
    edit = rng.integers(5)
    if edit == 0:
        lines.insert(int(rng.integers(len(lines) + 1)), lines[at])
    elif edit == 1:
        del lines[at]
    elif edit == 2:
        lines.insert(at, b"")
    elif edit == 3:
        lines = lines * 50
    return (b"\r", b"\r\n", b"\n")[rng.integers(3)].join(lines)


def _edit_values(content: bytes, rng: np.random.Generator) -> bytes:
    """Exchange columns, or replace a value by that of another row."""
    lines = [line.split(b",") for line in content.split(b"\n")]
    one, other = (int(i) for i in rng.integers(len(lines), size=2))
    column = int(rng.integers(len(HEADER)))
    if rng.integers(3) == 0:
        order = rng.permutation(len(HEADER))
        lines = [[line[i] for i in order] if len(line) == len(HEADER) else line for line in lines]
    elif column < min(len(lines[one]), len(lines[other])):
        lines[one][column] = lines[other][column]
    return b"\n".join(b",".join(line) for line in lines)


_DAMAGES = (_flip, _cut, _insert, _insert, _random, _encode, _edit_lines, _edit_values, _edit_values)
