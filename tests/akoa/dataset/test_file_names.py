"""File names: every spelling of a side, unknown forms, and which files are images of knees."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.akoa.dataset import file_names
from tests.akoa.dataset_cases import file_name

pytestmark = pytest.mark.no_shape_checks

SPELLINGS = ("RIGHT", "R_I_G_H_T", "LEFT", "L_E_F_T")


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_visits_are_not_patients() -> None:
    row = file_names.parse_name(file_name(5, 101, "LEFT", 0))
    assert (row.patient, row.visit) == ("0000005", 101)


@pytest.mark.parametrize("side", ["Right", "right", "R_I_G_H_T", "r_i_g_h_t"])
def test_right_in_another_spelling_is_not_left(side: str) -> None:
    """`"RIGHT" in name` called 1,280 right knees left."""
    assert file_names.parse_name(file_name(9000099, 3, side, 7)).side == "right"


@settings(deadline=None)
@given(
    st.sampled_from(SPELLINGS),
    st.integers(0, 9_999_999),
    st.integers(0, 999),
    st.integers(0, 39),
    st.sampled_from(["", "_"]),
    st.data(),
)
def test_every_spelling_in_any_case_parses(
    side: str, patient: int, visit: int, slice_: int, gap: str, data: st.DataObject
) -> None:
    name = file_name(patient, visit, side, slice_, gap)
    upper = data.draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
    name = "".join(c.upper() if up else c.lower() for c, up in zip(name, upper, strict=True))
    actual = file_names.parse_name(name)
    expected = "right" if side.lower().startswith("r") else "left"
    assert (actual.patient, actual.visit, actual.side) == (f"{patient:07}", visit, expected)
    assert (actual.slice, actual.underscore) == (slice_, bool(gap))
    assert actual.spelling.lower() == side.lower()


@settings(deadline=None)
@given(st.text("abcdefghilrtABCDEFGHILRT_", max_size=9))
def test_a_name_with_neither_side_fails(side: str) -> None:
    if side.lower() not in {"left", "l_e_f_t", "right", "r_i_g_h_t"}:
        with pytest.raises(ValueError, match="not of the form"):
            file_names.parse_name(file_name(9000099, 3, side, 7))


@pytest.mark.parametrize(
    "name",
    [
        file_name(9000099, 3, "RI_GHT", 7),
        file_name(9000099, 3, "RIGHT", 7) + "\n",
        "x" + file_name(9000099, 3, "RIGHT", 7),
        file_name(9000099, 3, "RIGHT", 7).replace(".png", ".jpg"),
        file_name(9000099, 3, "RIGHT", 7).replace("OAI9", "OAI"),
        file_name(9000099, 3, "RIGHT", 7).replace("SAG", "\u017fAG"),
        file_name(9000099, 3, "RIGHT", 7).replace("9000099", "\u0669" * 7),
        file_name(9000099, 3, "RIGHT", -1),
        file_name(9000099, 3, "RIGHT LEFT", 7),
    ],
)
def test_a_name_that_is_nearly_right_fails(name: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        file_names.parse_name(name)


def test_paths_that_are_not_portable_do_not_parse() -> None:
    name = file_name(9000099, 3, "RIGHT", 7)
    paths = [f"a\\b/{name}", f"c:/{name}", f"\udcff/{name}", f"a\n/{name}"]
    pictures, _, problems = file_names.classify_files(paths)
    assert not pictures
    assert {(p.kind, p.image) for p in problems} == {("unparsed", path) for path in paths}


def test_files_are_sorted_by_code_point(tmp_path: Path) -> None:
    """Upper case before lower case, on systems too that do not tell them apart."""
    touch(tmp_path, "c.png", "b/a.png", "B.png", "a-b/x.png", "a/z.png")
    actual = file_names.list_files(tmp_path)
    assert actual == ["B.png", "a-b/x.png", "a/z.png", "b/a.png", "c.png"]
    assert file_names.classify_files(actual[::-1]) == file_names.classify_files(actual)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.png", "real/b.png", "real/c/d.png")
    (tmp_path / "real" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "same").symlink_to(tmp_path / "real", target_is_directory=True)
    assert file_names.list_files(tmp_path) == ["real/a.png", "real/b.png", "real/c/d.png"]


@pytest.mark.parametrize("name", ["phantom.json", "readme.txt", "labels.csv", "scan.jpg", "AKOA_Analysis.zip", "png"])
def test_files_that_do_not_look_like_knees_are_ignored(name: str) -> None:
    assert file_names.classify_files([f"OAI/{name}"]) == ([], [f"OAI/{name}"], [])


@pytest.mark.refusal
@pytest.mark.parametrize(
    "name",
    [
        file_name(5, 3, "LEFT", 7).replace(".png", ".jpg"),
        file_name(5, 3, "LEFT", 7).lower() + ".part",
        "Copy of " + file_name(5, 3, "LEFT", 7),
        "oai",
        "scan.PNG",
    ],
)
def test_unparsed_files_that_look_like_knees_are_problems(name: str) -> None:
    pictures, ignored, problems = file_names.classify_files([name])
    assert (pictures, ignored) == ([], [])
    assert [(problem.kind, problem.image) for problem in problems] == [("unparsed", name)]


@pytest.mark.parametrize("name", ["Thumbs.db", ".DS_Store", "Desktop.ini", "._" + file_name(5, 3, "LEFT", 7)])
def test_junk_is_ignored_whatever_its_name_holds(name: str) -> None:
    assert file_names.classify_files([f"a/{name}"]) == ([], [f"a/{name}"], [])
