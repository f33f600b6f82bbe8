"""Tables in CSV format: any text is read as it was written, and a malformed file is refused with its name and line."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from examples.akoa.dataset import tables
from examples.akoa.dataset.labels import read_labels
from perceiver_core.atomic_files import write_atomically
from tests.akoa.dataset_cases import file_name

pytestmark = pytest.mark.no_shape_checks

HEADER = "image,patient,visit,side,slice,split"
NAMES = [file_name(1_000_001, 3, "LEFT", k) for k in range(5_000)]
LINES = [f"{name},1000001,3,left,{k},train" for k, name in enumerate(NAMES)]


def text(lines: list[str], end: str = "\n") -> str:
    return end.join([HEADER, *lines]) + end


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.csv"


@pytest.mark.parametrize(
    "name", ["a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", "=1+1", "a\x1b[2Jb", " a ", "", "\u202eé", "'"]
)
def test_values_are_read_as_written(path, name):
    written = tables.to_csv(("one", "two"), [(name, 1), ("x", name)])
    write_atomically({path: written})
    assert [line["one"] for _, line in tables.read_table(path, ("two", "one"))] == [name, "x"]
    with path.open(encoding="utf-8", newline="") as file:
        assert [line["two"] for line in csv.DictReader(file)] == ["1", name]
    assert "\r\n" not in written.replace(name, "")


def test_names_that_are_no_text_are_escaped(path):
    assert tables.to_csv(("one",), [("\udcff",)]) == "one\n\\udcff\n"


@pytest.mark.parametrize(
    "content",
    [
        text(LINES[:3]).encode(),
        text(LINES[:3], "\r\n").encode(),
        text(LINES[:3], "\r").encode(),
        text(LINES[:3]).encode("utf-8-sig"),
        text(LINES[:3]).rstrip().encode(),
        text(["", LINES[0], "", "", *LINES[1:3], "", ""]).encode(),
        "\n".join(["split,note,slice,side,visit,patient,image"] + [
            f'train,"an, ""other"" column",{k},left,3,1000001,"{name}"' for k, name in enumerate(NAMES[:3])
        ]).encode(),
    ],
)  # fmt: skip
def test_usual_variants_are_read(path, content):
    path.write_bytes(content)
    assert [(row.image, row.slice) for row in read_labels(path)] == list(zip(NAMES[:3], range(3), strict=True))


def with_line(number: int, line: str) -> bytes:
    """File of above 131 kB whose line of this number is replaced."""
    lines = [HEADER, *LINES]
    lines[number - 1] = line
    return "\n".join(lines).encode()


REFUSED = {
    "unclosed quote at the start": (with_line(7, '"' + LINES[5]), "line 7: the line is not in CSV format"),
    "unclosed quote at the end": (with_line(len(LINES) + 1, '"' + LINES[-1]), f"line {len(LINES) + 1}: .*quotation"),
    "quote that is closed later": (
        text([LINES[0], '"' + LINES[1], LINES[2], '"' + LINES[3]]).encode(),
        "line 3: the line is not in CSV format",
    ),
    "line break in a value": (text([LINES[0], f'"a\nb.png{LINES[1][80:]}"', LINES[1]]).encode(), "line 3: "),
    "quote within a value": (text([LINES[0], LINES[1], f'"a"b{LINES[2]}']).encode(), "line 4: .*quotation marks"),
    "null characters": (with_line(9, "\0" + LINES[7]), "line 9: the line contains a null character"),
    "UTF-16": (text(LINES[:5]).encode("utf-16"), "line 1: the file is in UTF-16 or UTF-32; save it in UTF-8"),
    "UTF-16 without a mark": (text(LINES[:5]).encode("utf-16-le"), "line 1: the line contains a null character"),
    "UTF-16, big-endian": (b"\xfe\xff" + text(LINES[:5]).encode("utf-16-be"), "line 1: the file is in UTF-16"),
    "UTF-32": (text(LINES[:5]).encode("utf-32"), "line 1: the file is in UTF-16"),
    "Latin-1": (text([LINES[0], "é" + LINES[1]]).encode("latin-1"), "line 3: byte 0xe9 is not valid in UTF-8"),
    "Latin-1 with CR": (text([*LINES[:3], "é"], "\r").encode("latin-1"), "line 5: byte 0xe9"),
    "a long value": (with_line(3, "a" * 200_000), "line 3: the line is not in CSV format"),
    "random": (bytes(range(128, 256)), "line 1: byte 0x80"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "line 1: byte 0x89"),
    "spaces": (text([*LINES[:2], "  "]).encode(), "line 4: it has 1 values, need 6"),
    "empty": (b"", "the file is empty"),
    "mark only": (b"\xef\xbb\xbf", "the file is empty"),
    "header only": (text([]).encode(), "the file is empty"),
    "no header": ("\n".join(LINES[:3]).encode(), "line 1: column 'image' is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_tables_are_refused(path, case):
    content, message = REFUSED[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"labels\.csv(: |, ){message}"):
        read_labels(path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes on Windows")
def test_what_is_no_file_is_refused(path, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="it is a folder, need a regular file"):
        read_labels(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"labels\.csv"):
        read_labels(path)
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"labels\.csv: it is a pipe"):
        read_labels(path)
    monkeypatch.setattr(tables, "MAX_BYTES", 99)
    (tmp_path / "large.csv").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"large\.csv: it has 100 bytes, more than 99, the limit"):
        read_labels(tmp_path / "large.csv")
