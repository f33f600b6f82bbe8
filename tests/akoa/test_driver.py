"""The driver: any files as input, one prediction each, and no silent omissions."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

import perceiver_core as pc
from examples.akoa import driver, train
from examples.akoa.dataset import __main__ as measurement
from examples.akoa.dataset.images import read_image
from examples.akoa.driver import Verdict, decide, find_images, group_by_volume, main
from examples.akoa.evaluation.inference import predict
from examples.akoa.model import knee_model

pytestmark = pytest.mark.no_shape_checks

SIZE = (23, 19)
NAME = "OAI1000001_BaseLine_3_de3d1_SAG_3D_DESS_WE_{}.nii.gz_{}.png"


@pytest.fixture(scope="module")
def model() -> pc.Perceiver:
    torch.manual_seed(0)
    return knee_model(SIZE).eval()


@pytest.fixture(scope="module")
def weights(model: pc.Perceiver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "run.json").write_text('{"size": [23, 19]}', encoding="utf-8")
    return pc.save(model, run / "weights")


@pytest.fixture
def knees(tmp_path: Path) -> Path:
    """Gray and color, of three sizes, nested; with what is no picture beside them."""
    folder = tmp_path / "knees"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (67, 59), np.uint8)
    Image.fromarray(gray).save(folder / NAME.format("RIGHT", 0))
    Image.fromarray(np.stack([gray] * 3, -1)).save(folder / NAME.format("RIGHT", 1))
    Image.fromarray(rng.integers(0, 256, (31, 101), np.uint8)).save(folder / "deep" / "any.PNG")
    Image.fromarray(rng.integers(0, 256, (31, 29, 4), np.uint8)).save(folder / "deep" / "see-through.png")
    (folder / "Thumbs.db").write_bytes(b"litter")
    (folder / "._any.png").write_bytes(b"litter")
    return folder


def read_results(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_results_equal_the_model_on_the_training_images(knees: Path, weights: Path, model: pc.Perceiver) -> None:
    out = knees.parent / "results.csv"
    assert main([str(knees), "--weights", str(weights), "--out", str(out)]) == 0
    lines = read_results(out)
    assert list(lines[0]) == list(driver.HEADER)
    assert len(lines) == 4
    for line in lines:
        picture = torch.tensor(read_image(Path(line["file"]), SIZE))[None]
        logit = predict(model, picture)[0]
        assert float(line["probability_right"]) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
        assert line["verdict"] == ("right" if logit > 0 else "left")
    by_name = {Path(line["file"]).name: line for line in lines}
    same = [by_name[NAME.format("RIGHT", k)]["probability_right"] for k in (0, 1)]
    assert float(same[0]) == pytest.approx(float(same[1]), abs=1e-5)  # gray, and the same in color


def test_maps_are_drawn(knees: Path, weights: Path) -> None:
    out, maps = knees.parent / "results.csv", knees.parent / "maps"
    command = [str(knees / "deep"), "--weights", str(weights), "--out", str(out), "--maps", str(maps)]
    assert main(command) == 0
    lines = read_results(out)
    assert len({line["map"] for line in lines}) == 2
    for line in lines:
        assert imread(line["map"]).std() > 0.01


def test_broken_files_are_named_and_skipped(knees: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (knees / NAME.format("RIGHT", 0)).read_bytes()
    (knees / "cut.png").write_bytes(whole[: len(whole) // 3])
    (knees / "empty.png").write_bytes(b"")
    (knees / "text.png").write_text("not a picture", encoding="utf-8")
    out = knees.parent / "results.csv"
    assert main([str(knees), "--weights", str(weights), "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    for name in ("cut.png", "empty.png", "text.png"):
        assert f"{name}:" in errors
    assert "3 of 7 files were skipped" in errors
    assert "labels.csv" not in errors
    assert len(read_results(out)) == 4


def test_only_broken_files(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    assert main([str(tmp_path), "--weights", str(weights), "--out", str(tmp_path / "results.csv")]) == 1
    assert read_results(tmp_path / "results.csv") == []


def test_screen_shows_files_and_volumes(knees: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(knees), "--weights", str(weights), "--threshold", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("abstain") == 4 + 1
    assert "any.PNG" in shown
    assert "1000001       3 right        2" in shown


def test_threshold() -> None:
    sure = np.log(0.9 / 0.1)
    assert decide(sure + 1e-9, 0.9)[0] == "right"
    assert decide(sure - 1e-3, 0.9)[0] == "abstain"
    assert decide(-sure - 1e-9, 0.9)[0] == "left"
    assert decide(-sure, 0.5)[1] == pytest.approx(0.1)


def test_volumes_are_gathered_by_name_and_folder() -> None:
    names = [("a", "RIGHT", 0), ("a", "R_I_G_H_T", 1), ("b", "RIGHT", 0), ("a", "LEFT", 0)]
    verdicts = [
        Verdict(Path(folder) / NAME.format(side, k), logit)
        for (folder, side, k), logit in zip(names, [1.0, 3.0, -1.0, -2.0], strict=True)
    ]
    actual = group_by_volume([*verdicts, Verdict(Path("a/holiday.png"), 9.0)])
    assert [(v.named_side, v.num_slices, v.logit) for v in actual] == [
        ("left", 1, -2.0),
        ("right", 2, 2.0),
        ("right", 1, -1.0),
    ]


def test_each_file_once(knees: Path) -> None:
    actual = find_images([knees / "deep", knees, knees / "deep" / "any.PNG"])
    assert len(actual) == 4
    assert actual == [*find_images([knees / "deep"]), *[p for p in find_images([knees]) if p.parent == knees]]


def test_many_images_keep_their_order(knees: Path, model: pc.Perceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    (knees / "deep" / "broken.png").write_bytes(b"")
    files = find_images([knees])
    whole = list(driver.classify(model, files, SIZE))
    monkeypatch.setattr(driver, "_BATCH", 2)
    pieces = list(driver.classify(model, files, SIZE))
    assert [item.file for item in whole] == [item.file for item in pieces] == files
    for one, other in zip(whole, pieces, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Verdict) and isinstance(other, Verdict):
            assert one.logit == pytest.approx(other.logit, abs=1e-5)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "does not exist; give PNG files"),
        (["{empty}"], "no PNG files below"),
        (["{knees}", "--threshold", "0.4"], "from 0.5 to 1"),
        (["{knees}", "--weights", "{missing}"], "train first"),
        (["{knees}", "--weights", "{empty}"], "pass the folder that save wrote"),
        (["{knees}", "--out", "{missing}/results.csv"], "is not a file in a folder that can be written to"),
        (["{knees}", "--out", "{empty}"], "is not a regular file"),
        (["{knees}", "--out", os.devnull], "is not a regular file"),
    ],
)
def test_invalid_arguments_are_reported(
    arguments: list[str],
    message: str,
    knees: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"missing": tmp_path / "missing", "empty": tmp_path / "empty", "knees": knees}
    given = [argument.format(**places) for argument in arguments]
    if "--weights" not in given:
        given += ["--weights", str(weights)]
    assert main(given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.refusal
@pytest.mark.parametrize("option", ["--out", "--maps"])
def test_a_folder_that_cannot_be_written_to_is_reported_first(
    option: str, knees: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(driver, "classify", None)
    assert main([str(knees), "--weights", str(weights), option, str(knees.parent / "new")]) == 2
    assert f"error: {option[2:]}: " in (text := capsys.readouterr().err)
    assert "in a folder that can be written to" in text


@pytest.mark.refusal
@pytest.mark.parametrize("size", ["0", "7 -1", "1 2 3", "1000000"])
@pytest.mark.parametrize(
    "command", ["driver . --weights nowhere", "dataset --data . --labels x", "train --data . --labels x"]
)
def test_sizes_are_checked_first(size: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = [*command.split(), "--size", *size.split()]
    commands = {"driver": driver.main, "dataset": measurement.main, "train": train.main}
    with pytest.raises(SystemExit, match="2"):
        commands[name](arguments)
    message = f"argument --size: must be one number, or height and width, from 1 to 4,096 pixels; got {size}\n"
    assert capsys.readouterr().err.endswith(message)


def test_results_are_written_atomically(knees: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = knees.parent / "results.csv"
    out.write_text("of yesterday", encoding="utf-8")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "predict", interrupt)
    assert main([str(knees), "--weights", str(weights), "--out", str(out)]) == 130
    assert out.read_text(encoding="utf-8") == "of yesterday"


@pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")
def test_special_files_are_skipped_and_do_not_block(
    knees: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(knees / "pipe.png")
    (knees / "circle.png").symlink_to("circle.png")
    (knees / "folder.png").mkdir()
    (knees / "device.png").symlink_to("/dev/zero")
    (knees / "loop").symlink_to(knees, target_is_directory=True)
    assert main([str(knees), str(knees / "dangling.png"), "--weights", str(weights)]) == 2
    assert "dangling.png does not exist" in capsys.readouterr().err
    (knees / "dangling.png").symlink_to("nowhere.png")
    assert main([str(knees), str(knees / "dangling.png"), "--weights", str(weights)]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("p(right) 0.") == 4
    for name, reason in (
        ("pipe", "it is a pipe"),
        ("circle", "symbolic links"),
        ("folder", "it is a folder"),
        ("device", "it is a device"),
        ("dangling", "No such file"),
    ):
        assert any(f"{name}.png: " in line and reason in line for line in shown.err.splitlines())
    assert "5 of 9 files were skipped" in shown.err


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_names_cannot_forge_verdicts(knees: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = (knees / NAME.format("RIGHT", 0)).read_bytes()
    folder = knees.parent / "odd\x1b[2J\nleft     p(right) 0.001  a"
    folder.mkdir()
    names = ["a\nright    p(right) 1.000  b.png", "\x9b2J\r\u202egnp.png", '=1+1,"x".png', "c\r.png"]
    for name in names:
        (folder / name).write_bytes(picture)
    (folder / "broken\n\x1b[1A.png").write_bytes(b"")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(picture)
    out = knees.parent / "results.csv"
    arguments = [str(folder), "--weights", str(weights)]
    assert main(arguments) == main([*arguments, "--out", str(out), "--maps", str(knees.parent / "maps")]) == 1
    assert main([f"{folder}nowhere", "--weights", str(weights)]) == 2
    shown = "".join(capsys.readouterr())
    assert set(shown) <= {"\n", *map(chr, range(32, 127))}
    assert sum(line.startswith(("left", "right")) for line in shown.splitlines()) == 5
    lines = {Path(line["file"]).name: line for line in read_results(out)}
    assert set(lines) == {*names, r"\udcff.png"}
    assert all(Path(line["map"]).is_file() for line in lines.values())


def test_results_do_not_replace_an_image(knees: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = knees / NAME.format("RIGHT", 0)
    picture = path.read_bytes()
    assert main([str(knees), "--weights", str(weights), "--out", str(path)]) == 2
    assert "is the name of an image" in capsys.readouterr().err
    assert path.read_bytes() == picture
