"""The command that writes labels.csv or reports the problems of a folder."""

import contextlib
import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.akoa import generate_labels
from examples.akoa.dataset import audit_texts, file_names, near_duplicates
from examples.akoa.dataset import labels as lb
from examples.akoa.dataset.labels import Row
from examples.akoa.generate_labels import main
from examples.akoa.phantom import dataset as phantom
from tests.akoa.dataset_cases import HEIGHT, WIDTH, draw, file_name

pytestmark = pytest.mark.no_shape_checks

Folder = Callable[[dict[str, bytes]], Path]


def png(gray: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.stack([gray] * 3, axis=-1)).save(file, "PNG")
    return file.getvalue()


def knees(patients: int, visits: int = 1, slices: int = 1) -> dict[str, bytes]:
    """Images of patients with a right knee, a left knee or both, in all spellings."""
    files: dict[str, bytes] = {}
    for patient in range(patients):
        for side in (("RIGHT",), ("L_E_F_T",), ("Right", "left"))[patient % 3]:
            for visit in range(3, 3 + visits):
                for k in range(slices):
                    name = file_name(patient, visit, side, k, "_" * (visit % 2))
                    files[name] = png(draw(len(files)))
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def write(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "data"

    return write


def run(data: Path, *more: str) -> tuple[int, list[Row], list[dict[str, str]]]:
    """Exit code, rows and problems of the command; no rows if there is no labels.csv."""
    out = data.parent / "labels.csv"
    code = main(["--data", str(data), "--out", str(out), *more])
    with out.with_name("labels.problems.csv").open(encoding="utf-8", newline="") as file:
        problems = list(csv.DictReader(file))
    assert not list(out.parent.glob(".*.tmp"))
    return code, lb.read_labels(out) if out.exists() else [], problems


def spoil(files: dict[str, bytes]) -> dict[str, list[str]]:
    """Add one problem of each kind; returns the files that are then left out of the labels."""
    first, second, third, *_ = sorted(files)
    broken, other = file_name(0, 50, "RIGHT", 0), file_name(1, 51, "RIGHT", 0)
    files[broken] = png(draw(901))[:-300]
    files["Left/" + other] = png(draw(902))
    jpeg = file_name(2, 52, "RIGHT", 0).replace(".png", ".jpg")
    files[jpeg] = b"?"
    copy = f"A/{first.replace('_de3d1', 'de3d1')}"
    files[copy] = png(draw(903))
    gray = np.asarray(Image.open(io.BytesIO(files[second])).convert("L"))
    for patient in (71, 72, 73):  # three, so that the split parts one from the others
        files[file_name(patient, 3, file_names.parse_name(second).side, 0)] = png(gray)
    files[file_name(74, 3, file_names.parse_name(third).side, 0)] = png(draw(904))
    files[file_name(74, 4, file_names.parse_name(third).side, 0)] = png(draw(904)[:, ::-1])
    return {
        "unparsed": [jpeg],
        "unreadable": [broken],
        "disagreeing": ["Left/" + other],
        "duplicates": [first],  # A/ comes before it
        "near-duplicates": [],
        "contradicting": [],
    }


def test_labels_do_not_depend_on_the_order_of_the_listing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label numbers once came from an unsorted listing, and the split with them."""
    data = folder({f"{'ab'[i % 2]}/{name}": c for i, (name, c) in enumerate(knees(7).items())})
    run(data)
    first = (data.parent / "labels.csv").read_bytes()
    walk = os.walk

    def backwards(
        top: Path, onerror: Callable[[OSError], None], followlinks: bool
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        for at, below, files in walk(top, onerror=onerror, followlinks=followlinks):
            below.reverse()
            yield str(at), below, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    run(data)
    assert (data.parent / "labels.csv").read_bytes() == first


def test_all_layouts_give_one_split(folder: Folder) -> None:
    flat = knees(7)
    side = {name: file_names.parse_name(name).side for name in flat}
    places: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        lambda name: f"AKOA_Analysis/AKOA_Analysis/{name}",
        lambda name: f"AKOA_Analysis/{side[name].upper()}/{name}",
    )
    splits = []
    for at, place in enumerate(places):
        data = folder({f"{at}/{place(name)}": content for name, content in flat.items()})
        code, rows, problems = run(data / str(at))
        assert (code, problems) == (0, [])
        assert [row.image for row in rows] == sorted(place(name) for name in flat)
        splits.append({Path(row.image).name: row.split for row in rows})
    assert splits[0] == splits[1] == splits[2]


def test_the_manifest_counts(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder({**knees(6, slices=2), "Thumbs.db": b"", "b/.DS_Store": b"", "._a.png": b"", "._b.png": b""})
    assert run(data)[0] == 0
    text = capsys.readouterr().out
    assert "ignored     .DS_Store 1, ._* 2, Thumbs.db 1\n" in text
    assert "L_E_F_T 4, RIGHT 4, Right 4, left 4" in text
    assert f"{WIDTH}x{HEIGHT} 16" in text
    assert "left 8, right 8" in text
    assert "2 in 8 volumes" in text
    assert "no problems found" in text
    assert text.split("all", 1)[1].split()[:4] == ["6", "8", "16", "50.0%"]


def test_ignored_files_are_counted_by_extension(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    others = ("a.json", "b/c.JSON", "d.tar.gz", "LICENSE", "labels.old.csv", ".DS_Store")
    data = folder({**knees(5), **dict.fromkeys(others, b"?")})
    code, rows, problems = run(data)
    assert (code, len(rows), problems) == (0, len(knees(5)), [])
    assert "ignored     .DS_Store 1, .csv 1, .gz 1, .json 2, no extension 1\n" in capsys.readouterr().out


def test_an_unprintable_name_does_not_stop_the_report() -> None:
    text = audit_texts.summarize([], [], ["a.\udcff"], Counter())
    assert "ignored     .\\udcff 1\n" in text


def test_the_manifest_of_the_phantom_is_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "phantom"
    phantom.write(out, patients=7, slices=1)
    code, rows, problems = run(out, "--allow", "unreadable")
    assert (code, [problem["kind"] for problem in problems]) == (0, ["unreadable"])
    assert len({row.patient for row in rows}) == 7
    assert "ignored     .json 1, .lock 1, Thumbs.db 1\n" in capsys.readouterr().out


def test_folds_are_written(folder: Folder) -> None:
    _, rows, _ = run(folder(knees(7)), "--folds", "5")
    assert {row.split for row in rows} == {f"fold{i}" for i in range(5)}
    lb.audit_split(rows)


def test_every_kind_stops_the_run_until_all_are_allowed(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    files = knees(8)
    left_out = spoil(files)
    data = folder(files)
    code, rows, problems = run(data)
    assert (code, rows) == (1, [])
    assert {problem["kind"] for problem in problems} == set(file_names.PROBLEM_KINDS) == set(left_out)
    for kind, images in left_out.items():
        actual = [problem["image"] for problem in problems if problem["kind"] == kind]
        assert actual == images or not images
    second = sorted(knees(8))[1]
    copies = {second, *(file_name(n, 3, file_names.parse_name(second).side, 0) for n in (71, 72, 73))}
    alike = [problem for problem in problems if problem["kind"] == "near-duplicates"]
    assert {problem[key] for problem in alike for key in ("image", "other")} == copies
    text = capsys.readouterr().out
    for kind, advice in file_names.PROBLEM_KINDS.items():
        assert f"--allow {kind}; then {advice.allowed}" in text
        assert advice.fix in text
        others = [other for other in file_names.PROBLEM_KINDS if other != kind]
        assert run(data, "--allow", *others)[:2] == (1, [])
    code, rows, again = run(data, "--allow", "all")
    assert (code, again) == (0, problems)
    gone = [image for images in left_out.values() for image in images]
    assert sorted([row.image for row in rows] + gone) == sorted(files)


def test_examples_are_few_and_the_list_is_full(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder({**knees(5), **{f"note{i}.png": b"" for i in range(11)}})
    _, _, problems = run(data, "--examples", "2")
    assert len(problems) == 11
    text = capsys.readouterr().out
    assert text.count("not of the form") == 2
    assert "... all 11 in" in text


@pytest.mark.parametrize("cut", [1, 13, 17, 31, 1000])
def test_an_image_cut_short_is_unreadable(tmp_path: Path, cut: int) -> None:
    whole = png(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8))
    path = tmp_path / "a.png"
    path.write_bytes(whole)
    assert generate_labels.read_thumbnail(path)[0].shape == near_duplicates.THUMBNAIL_SIZE
    path.write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=r"truncated"):
        generate_labels.read_thumbnail(path)


def test_a_file_that_is_no_png_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="it is not a PNG file"):
        generate_labels.read_thumbnail(path)


def test_labels_inside_the_data_folder_are_not_data(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(knees(5))
    for _ in range(2):
        assert main(["--data", str(data), "--out", str(data / "labels.csv")]) == 0
        assert "ignored     none\n" in capsys.readouterr().out
    lb.audit_split(lb.read_labels(data / "labels.csv"))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "missing"], "does not exist or is not a folder"),
        (["--fractions", "0.6", "0.2", "0.3"], "add to 1.1, not 1"),
        (["--folds", "2"], "need 3 (test, validation, training) to 10,000"),
        (["--folds", "100000000000"], "need 3 (test, validation, training) to 10,000"),
        (["--folds", "6"], "got 5 patients, too few for 6 parts"),
        (["--out", "missing/labels.csv"], "is not a file in a folder that can be written to"),
        (["--out", "."], "is not a regular file"),
        (["--out", "knee.PNG"], "is the name of an image"),
    ],
)
def test_invalid_arguments_are_reported_before_any_work(
    folder: Folder,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = folder(knees(5))
    monkeypatch.chdir(data.parent)
    monkeypatch.setattr(generate_labels, "read_thumbnail", pytest.fail)
    assert main(["--data", str(data), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (data.parent / "labels.csv").exists()


def test_too_few_patients_says_what_was_left_out(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder({**knees(2), "OAI_what.png": b""})
    assert main(["--data", str(data), "--out", str(data.parent / "labels.csv")]) == 2
    assert "got 2 patients" in (text := capsys.readouterr().err)
    assert "OAI_what.png" in text


@pytest.mark.refusal
def test_a_folder_without_images_is_reported(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder({"Thumbs.db": b"", "readme.txt": b""})
    assert main(["--data", str(data), "--out", str(data.parent / "labels.csv")]) == 2
    assert "contains no PNG files" in capsys.readouterr().err


def test_an_interrupt_leaves_no_files(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    data = folder(knees(5))
    monkeypatch.setattr(generate_labels, "read_thumbnail", interrupted)
    assert main(["--data", str(data), "--out", str(data.parent / "labels.csv")]) == 130
    assert [path.name for path in data.parent.iterdir()] == ["data"]


@pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")
def test_special_files_are_problems_and_do_not_block(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(knees(5))
    pipe, circle, other = (file_name(n, 60, "RIGHT", 0) for n in range(3))
    os.mkfifo(data / pipe)
    (data / circle).symlink_to(circle)
    (data / other).mkdir()
    (data / "pipe.png").symlink_to(data / pipe)
    os.mkfifo(data / "pipe.txt")
    (data / "loop").symlink_to(data, target_is_directory=True)
    code, rows, problems = run(data, "--allow", "all")
    assert (code, len(rows)) == (0, len(knees(5)))
    details = {problem["image"]: problem["detail"] for problem in problems if problem["kind"] == "unreadable"}
    assert set(details) == {pipe, circle, other}
    assert "it is a pipe" in details[pipe]
    assert "it is a folder" in details[other]
    assert "ignored     .txt 1\n" in capsys.readouterr().out


def test_a_file_that_vanishes_is_a_problem(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(knees(5))
    names = sorted(knees(5))
    read = generate_labels.read_thumbnail

    def vanish(path: Path) -> object:
        (data / names[-1]).unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(generate_labels, "read_thumbnail", vanish)
    code, rows, problems = run(data, "--allow", "unreadable")
    assert (code, [problem["image"] for problem in problems]) == (0, names[-1:])
    assert [row.image for row in rows] == names[:-1]


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_names_cannot_forge_lines(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["OAI\nno problems found.png", "OAI\x1b[2J\x9b1A\r.png", "OAI\u202egnp\u200b.png", "a.\x1b]0;b\x07"]
    data = folder({**knees(5), **dict.fromkeys(names, b"")})
    (data / os.fsdecode(b"OAI\xff.png")).write_bytes(b"")
    _, _, problems = run(data)
    shown = "".join(capsys.readouterr())
    assert set("".join(map(chr, range(32))) + "\x7f\x9b\u202e\u200b\udcff") & set(shown) <= {"\n"}
    assert not any(line.startswith("no problems") for line in shown.splitlines())
    assert r"OAI\nno problems found.png" in shown
    assert {problem["image"] for problem in problems} == {*names[:3], r"OAI\udcff.png"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("labels*"))}


@pytest.mark.parametrize("allowed", [[], ["--allow", "unparsed"]])
@pytest.mark.parametrize("number", range(3))
def test_labels_are_never_beside_problems_of_another_run(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, number: int, allowed: list[str]
) -> None:
    """The run is killed at each of its renames."""
    data = folder(knees(5))
    assert run(data)[0] == 0
    before = files_of(data.parent)
    (data / "OAI_what.png").write_bytes(b"")
    (data / sorted(knees(5))[0]).unlink()
    replace, renamed = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if len(renamed) == number:
            raise SystemExit
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "replace", lambda path, target: killed(path, target))
    with contextlib.suppress(SystemExit):
        main(["--data", str(data), "--out", str(data.parent / "labels.csv"), *allowed])
    after = files_of(data.parent)
    if after["labels.problems.csv"] == before["labels.problems.csv"]:
        assert after.get("labels.csv") in (None, before["labels.csv"])
    else:
        assert after.get("labels.csv") != before["labels.csv"]
    assert before["labels.csv"] in after.values()


def test_earlier_labels_are_kept(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(knees(5))
    run(data)
    first = files_of(data.parent)
    run(data)
    assert files_of(data.parent) == first
    run(data, "--seed", "1")
    second = files_of(data.parent)
    assert second["labels.csv.previous"] == first["labels.csv"] != second["labels.csv"]
    (data / "OAI_what.png").write_bytes(b"")
    code, rows, _ = run(data)
    assert (code, rows) == (1, [])
    assert files_of(data.parent)["labels.csv.previous"] == second["labels.csv"]
    assert "the labels of an earlier run are now" in capsys.readouterr().out


def test_a_failed_write_changes_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(knees(5))
    run(data)
    before = files_of(data.parent)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["--data", str(data), "--out", str(data.parent / "labels.csv"), "--seed", "1"]) == 2
    assert files_of(data.parent) == before
