"""Phantom data sets have the properties that the AKOA example relies on: proportions, names, layouts, traps."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.akoa.phantom.anatomy import Knee, Side
from examples.akoa.phantom.canvas import HEIGHT, WIDTH
from examples.akoa.phantom.dataset import FOLDER, MANIFEST, SPELLINGS, Layout, Volume, main, plan, write
from examples.akoa.phantom.rendering import render

pytestmark = pytest.mark.no_shape_checks

NAME = re.compile(
    r"OAI(\d{7})_BaseLine_(\d+)(_?)de3d1_SAG_3D_DESS_WE_"
    r"(RIGHT|Right|R_I_G_H_T|LEFT|Left|L_E_F_T)\.nii\.gz_(\d+)\.png"
)
PATIENTS, SLICES = 9, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom")
    write(out, patients=PATIENTS, slices=SLICES)
    return out


def pictures(out: Path) -> list[Path]:
    return sorted((out / FOLDER).rglob("*.png"))


def loads(path: Path) -> bool:
    with Image.open(path) as picture:
        try:
            picture.load()
        except OSError:
            return False
    return True


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_patient_has_one_shape_at_every_visit() -> None:
    volumes = plan(61, seed=5)
    shapes: dict[tuple[str, str], set[Knee]] = defaultdict(set)
    for volume in volumes:
        shapes[volume.patient, volume.knee.side].add(volume.knee)
    assert all(len(knees) == 1 for knees in shapes.values())
    visits = Counter((v.patient, v.knee.side) for v in volumes)
    assert set(visits.values()) == {1, 2, 3}
    assert len({v.visit for v in volumes}) == len(volumes)
    pairs = [p for p, _ in shapes if (p, "left") in shapes and (p, "right") in shapes]
    assert 0.1 * 61 < len(pairs) / 2 < 0.5 * 61


def test_the_default_plan_has_the_proportions_of_the_real_data() -> None:
    volumes = plan()
    assert len({v.patient for v in volumes}) == 101
    assert 6000 <= 40 * len(volumes) <= 8000
    spellings = Counter(v.spelling for v in volumes)
    shares: dict[Side, float] = {"right": 10920 / 18680, "left": 7760 / 18680}
    for side, share in shares.items():
        mine = [v for v in volumes if v.knee.side == side]
        assert len(mine) / len(volumes) == pytest.approx(share, abs=0.02)
        total = sum(SPELLINGS[side].values())
        for spelling, count in SPELLINGS[side].items():
            assert spellings[spelling] / len(mine) == pytest.approx(count / total, abs=0.02)
    baselines = Counter(v.baseline for v in volumes)
    assert set(baselines) == {"3_", "3", "4_", "100", "101"}
    names = [v.name(0) for v in volumes]
    assert len(set(names)) == len(names)


def difficulty(volume: Volume) -> list[float]:
    """Numbers that determine how hard the images of a volume are, and its visit."""
    knee, visit = volume.knee, volume.visit
    drawn = [getattr(part, f.name) for part in (knee, visit) for f in dataclasses.fields(part) if f.metadata]
    contrast = visit.muscle - visit.fat
    far = [abs(visit.turn), abs(visit.shift_x), abs(visit.shift_y), contrast, abs(contrast)]
    return [*drawn, *far, len(visit.wedges), len(knee.cysts), float(volume.baseline.rstrip("_"))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_spelling_says_nothing_about_difficulty(side: Side) -> None:
    volumes = [v for v in plan(400, seed=3) if v.knee.side == side]
    columns = np.array([difficulty(v) for v in volumes]).T
    for spelling in SPELLINGS[side]:
        mine = np.array([v.spelling == spelling for v in volumes], dtype=float)
        actual = np.array([np.corrcoef(mine, column)[0, 1] for column in columns])
        # At random, each correlation has a standard error of 1 / sqrt(volumes - 1).
        assert np.abs(actual).max() < 4 / np.sqrt(len(volumes) - 1)
        assert np.square(actual).mean() < 1.5 / (len(volumes) - 1)


def test_other_spellings_leave_every_image_unchanged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reversed_spellings(patients: int, seed: int) -> list[Volume]:
        volumes = plan(patients, seed)
        dealt = {side: [v.spelling for v in volumes if v.knee.side == side] for side in SPELLINGS}
        return [dataclasses.replace(v, spelling=dealt[v.knee.side].pop()) for v in volumes]

    def unspelled(out: Path) -> dict[tuple[str, ...], bytes]:
        actual = [(NAME.fullmatch(p.name), p) for p in pictures(out)]
        return {(m[1], m[2], m[3], m[4][0].upper(), m[5]): p.read_bytes() for m, p in actual if m}

    monkeypatch.setattr("examples.akoa.phantom.dataset.plan", reversed_spellings)
    write(tmp_path, patients=PATIENTS, slices=SLICES)
    assert {p.name for p in pictures(tmp_path)} != {p.name for p in pictures(data)}
    assert unspelled(tmp_path) == unspelled(data)


def test_names_parse_and_show_all_six_spellings(data: Path) -> None:
    actual = [NAME.fullmatch(p.name) for p in pictures(data)]
    assert all(actual)
    assert {m[4] for m in actual if m} == {name for side in SPELLINGS.values() for name in side}
    assert {m[3] for m in actual if m} == {"", "_"}
    assert not any(m[1].startswith("9") for m in actual if m)  # no number of a real participant


def test_volumes_are_complete_but_for_one_truncated_image(data: Path) -> None:
    broken = [p for p in pictures(data) if not loads(p)]
    assert len(broken) == 1
    slices: dict[str, list[int]] = defaultdict(list)
    for path in pictures(data):
        stem, index = path.stem.rsplit("_", 1)
        slices[stem].append(int(index))
    assert slices.pop(broken[0].stem.rsplit("_", 1)[0]) == [0]
    assert all(sorted(actual) == list(range(SLICES)) for actual in slices.values())
    assert (data / FOLDER / "Thumbs.db").read_bytes().startswith(b"\xd0\xcf\x11\xe0")


def test_an_image_is_rgb_with_three_equal_channels(data: Path) -> None:
    whole = next(p for p in pictures(data) if loads(p))
    with Image.open(whole) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (260, 228))
        red, green, blue = (np.asarray(band) for band in picture.split())
    assert np.array_equal(red, green) and np.array_equal(red, blue)


@pytest.mark.parametrize(
    ("layout", "folders"),
    [("flat", {"."}), ("nested", {"AKOA_Analysis"}), ("sides", {"left", "right"})],
)
def test_layouts_hold_the_same_images(data: Path, tmp_path: Path, layout: Layout, folders: set[str]) -> None:
    write(tmp_path, patients=PATIENTS, slices=SLICES, layout=layout)
    top = tmp_path / FOLDER
    assert {str(p.parent.relative_to(top)) for p in pictures(tmp_path)} == folders
    assert all((top / folder / "Thumbs.db").is_file() for folder in folders)
    assert {p.name: p.read_bytes() for p in pictures(tmp_path)} == {p.name: p.read_bytes() for p in pictures(data)}
    if layout == "sides":
        sides = {p.parent.name[0] + p.name.split("_WE_")[1][0].lower() for p in pictures(tmp_path)}
        assert sides == {"ll", "rr"}


def test_the_seed_determines_all_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        write(tmp_path / name, patients=3, slices=2, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert set(content(tmp_path / "a")) != set(content(tmp_path / "c"))


def test_a_complete_phantom_is_left_alone_and_a_partial_one_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--patients", "2", "--slices", "2"]
    main(arguments)
    assert re.search(r"wrote \d+ files", capsys.readouterr().out)
    first = content(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in pictures(tmp_path)}
    main(arguments)
    assert "already complete, nothing to do" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in pictures(tmp_path)}

    pictures(tmp_path)[1].unlink()  # a lost file
    assert write(tmp_path, patients=2, slices=2) > 0
    (tmp_path / MANIFEST).unlink()  # an interrupted run
    pictures(tmp_path)[0].rename(f"{pictures(tmp_path)[0]}.{'0a' * 8}.partial")
    assert write(tmp_path, patients=2, slices=2) > 0
    assert content(tmp_path) == first


def test_files_of_another_phantom_are_neither_mixed_nor_overwritten(tmp_path: Path) -> None:
    write(tmp_path, patients=2, slices=2)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"contains \d+ files that are not of this phantom"):
        write(tmp_path, patients=2, slices=2, seed=1)
    assert content(tmp_path) == before


def test_neither_brightness_nor_border_reveals_the_side() -> None:
    """Brightness, and which half of the border is brighter, average out over many knees."""
    volumes = plan(53, seed=1)
    edge = np.ones((HEIGHT, WIDTH), dtype=bool)
    edge[23:-23, 26:-26] = False
    whole: list[float] = []
    tilt: list[float] = []
    for index, volume in enumerate(volumes):
        shown = render(volume.knee, volume.visit, (index % 7) / 6).astype(float)
        whole.append(shown.mean())
        ramp = np.where(edge, shown, 0.0).sum(0) * np.sign(np.arange(WIDTH) - WIDTH / 2)
        tilt.append(ramp.sum() / np.where(edge, shown, 0.0).sum())
    right = np.array([v.knee.side == "right" for v in volumes], dtype=float)
    bound = 3 / np.sqrt(len(volumes))  # three standard errors of a correlation of nothing
    assert abs(np.corrcoef(right, whole)[0, 1]) < bound
    assert abs(np.corrcoef(right, tilt)[0, 1]) < bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": 0}, "patients=0: expected 1 or more"),
        ({"slices": 0}, "slices=0: expected 1 or more"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
        ({"layout": "heap"}, "layout='heap': expected one of flat, nested, sides"),
    ],
)
def test_invalid_arguments_are_named(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write(tmp_path, **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.refusal
def test_the_command_line_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--patients", "-3"])
    assert capsys.readouterr().err.endswith("--patients: must be a whole number from 1 to 1,000,000; got '-3'\n")


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_the_printed_folder_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[2J\nfake"
    for done in ("wrote ", "already complete"):
        main(["--out", str(folder), "--patients", "4", "--slices", "1"])
        (line,) = capsys.readouterr().out.splitlines()
        assert rf"a\x1b[2J\nfake: {done}" in line
