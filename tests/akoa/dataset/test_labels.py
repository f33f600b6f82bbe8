"""Rows of labels.csv and the audit of a split, with a test for each failure of earlier projects."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from examples.akoa.dataset import labels as lb
from examples.akoa.dataset.labels import Row
from tests.akoa.dataset_cases import file_name

pytestmark = pytest.mark.no_shape_checks

KNEE = file_name(1_000_001, 3, "L_E_F_T", 7)


def good_rows() -> list[Row]:
    parts = ("train", "train", "train", "val", "test")
    return [
        Row(file_name(i, visit, side, 0), f"{i:07}", visit, side, 0, part)
        for i, part in enumerate(parts)
        for visit, side in ((3, "left"), (101, "right"))
    ]


def test_a_good_split_passes() -> None:
    lb.audit_split(good_rows())


@pytest.mark.refusal
def test_a_patient_in_two_parts_raises() -> None:
    rows = good_rows()
    row = next(row for row in rows if row.split == "train")
    rows.append(replace(row, image="other.png", split="test"))
    with pytest.raises(ValueError, match=f"{row.patient} in test and train"):
        lb.audit_split(rows)


@pytest.mark.refusal
def test_an_empty_part_raises() -> None:
    with pytest.raises(ValueError, match="need images in each of"):
        lb.audit_split([row for row in good_rows() if row.split != "val"])


@pytest.mark.refusal
def test_a_missing_fold_raises() -> None:
    rows = [Row(f"{i}.png", f"{i:07}", 3, "left", 0, f"fold{i % 5}") for i in range(7)]
    lb.audit_split(rows)
    with pytest.raises(ValueError, match="need images in each of"):
        lb.audit_split([row for row in rows if row.split != "fold1"])
    with pytest.raises(ValueError, match="need images in each of"):
        lb.audit_split([row for row in rows if row.split in {"fold0", "fold1"}])


@pytest.mark.refusal
def test_an_image_in_two_rows_raises() -> None:
    rows = good_rows()
    with pytest.raises(ValueError, match="occur twice"):
        lb.audit_split([*rows, rows[0]])


def test_labels_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    lb.write_labels(path, good_rows())
    assert lb.read_labels(path) == good_rows()
    assert path.read_bytes().startswith(b"image,patient,visit,side,slice,split\n")
    assert b"\r" not in path.read_bytes()


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n\n", "is empty"),
        ("image,patient,visit,side,slice,split\n", "is empty"),
        ("image,patient,visit,slice,split\na.png,9000099,1,0,test\n", "column 'side' is missing"),
        ("{},9000099,1,Right,0,test", "side is 'Right', need left or right"),
        ("{},9000099,1,left", "line 2: it has 4 values, need 6"),
        ("{},9000099,1,left,0,test,more", "line 2: it has 7 values, need 6"),
        ("{},9000099,1,left,,test", "slice is '', need a whole number"),
        ("{},9000099,1,left,9999999999,test", "slice is '9999999999', need a whole number of at most 9 digits"),
        ("{},9000099,1,left,-1,test", "slice is '-1'"),
        ("{},٩٠٠٠٠٩٩,1,left,0,test", "patient is '.*', need 7 digits"),
        ("{},9000099,1,left,0,fold01", "split is 'fold01'"),
        ("{},9000099,1,left,0,test\n{},9000099,1,left,0,test", "line 3: image 'a.png' occurs twice, first in line 2"),
        (
            "{},9000099,1,left,0,test\nb/{},9000099,1,left,0,test",
            "line 3: image 'b/a.png' has the patient.* of line 2;",
        ),
        ("a_RIGHT.nii.gz_1 (1).png,9000099,1,left,0,test", "side is 'left', but 'right' in the name 'a_RIGHT"),
        (f"Copy of {KNEE},1000001,3,right,7,test", "side is 'right', but 'left' in the name 'Copy of"),
        ("./a.png,9000099,1,left,0,test", "without '.'"),
        ("b//a.png,9000099,1,left,0,test", "'//'"),
        ("b/,9000099,1,left,0,test", "image is 'b/'"),
        ("RIGHT/a.png,9000099,1,left,0,test", "side is 'left', but the folder of 'RIGHT/a.png' is 'right'"),
        (f"{KNEE},1000001,3,right,7,test", "line 2: side is 'right', but 'left' in the name"),
        (f"b/{KNEE},1000002,3,left,7,test", "patient is '1000002', but '1000001' in the name 'b/OAI"),
        (f"{KNEE},1000001,4,left,7,test", "visit is 4, but 3 in the name .*; correct one of them"),
        (f"{KNEE},1000001,3,left,8,test", "slice is 8, but 7 in the name"),
        ("image,patient,visit,side,slice,split,side\n", "column 'side' is duplicated"),
        ("image;patient;visit;side;slice;split\n", "column 'image' is missing"),
        ("{},9000099,one,left,0,test", "visit is 'one'"),
        ("{},99,1,left,0,test", "patient is '99', need 7 digits"),
        ("{},9000099,1,left,0,holdout", "split is 'holdout'"),
        ("/a.png,9000099,1,left,0,test", "line 2: image is '/a.png'"),
        ("../a.png,9000099,1,left,0,test", "image is '../a.png', .*without .*'..'"),
        ("b/../a.png,9000099,1,left,0,test", "without .*'..'"),
        ("C:/a.png,9000099,1,left,0,test", "image is 'C:/a.png'"),
        ("b\\a.png,9000099,1,left,0,test", "backslash"),
        (",9000099,1,left,0,test", "image is ''"),
    ],
)
def test_invalid_labels_raise(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    header = "" if not text.strip() or text.startswith(("image,", "image;")) else ",".join(lb.HEADER) + "\n"
    path.write_text(header + text.replace("{}", "a.png"), encoding="utf-8")
    if "empty" not in message and "column" not in message:
        message = rf"labels\.csv, line [23]: .*{message.removeprefix('line 2: ').removeprefix('line 3: ')}"
    with pytest.raises(ValueError, match=message.replace("'..'", r"'\.\.'")):
        lb.read_labels(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("old", encoding="utf-8")

    def interrupted() -> Iterator[Row]:
        yield good_rows()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lb.write_labels(path, interrupted())
    assert [file.name for file in tmp_path.iterdir()] == ["labels.csv"]
    assert path.read_text(encoding="utf-8") == "old"
