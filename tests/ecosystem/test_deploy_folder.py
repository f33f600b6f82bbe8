"""Folders with an exported program, its model's configuration and its preprocessing, and a reader without PyTorch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import perceiver_core as pc
from examples.deploy.run_program import read_folder, read_image
from tests.ecosystem.export_cases import CASES, built, drawn, image, perceiver, varying

pytestmark = [
    pytest.mark.compile,
    pytest.mark.no_shape_checks,
    # torch's own, when it decomposes an exported program
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "deploy" / "run_program.py"
PREPROCESSING = {
    "mode": "RGB",
    "size": [7, 11],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "classes": ["ant", "bee", "cat", "dog", "emu"],
}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    case = CASES["image"]
    model, (args, _) = built(case), case.inputs(5, 8)
    program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=varying(model, case), verbose=False)
    folder = tmp_path_factory.mktemp("deployed")
    assert pc.checkpoints.save_program(program, folder, model=model, preprocessing=PREPROCESSING) == folder
    return model, folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (19, 23, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_it_holds_the_program_the_configuration_and_the_preprocessing(deployed):
    model, folder = deployed
    assert sorted(path.name for path in folder.iterdir()) == ["deployment.json", "model.onnx"]
    deployment = json.loads((folder / "deployment.json").read_text())
    assert deployment["preprocessing"] == PREPROCESSING
    again = pc.registry.from_config(deployment["model"]).eval()
    again.load_state_dict(model.state_dict())
    x = drawn(2, 3, 7, 11)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_it_runs_as_the_model_does(deployed, picture):
    model, folder = deployed
    session, preprocessing = read_folder(folder)
    x = read_image(picture, preprocessing)
    (logits,) = session.run(None, {"inputs": x})
    expected = model(torch.from_numpy(x)).detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


def test_a_process_without_this_library_and_pytorch_reads_it(deployed, picture):
    model, folder = deployed
    # None makes an import fail.
    code = (
        "import runpy, sys; sys.modules.update(torch=None, perceiver_core=None); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(picture)], capture_output=True, text=True, check=True, timeout=120
    )
    label = PREPROCESSING["classes"][int(model(torch.from_numpy(read_image(picture, PREPROCESSING))).argmax())]
    assert done.stdout.split() == ["picture.png", label]


def test_a_program_of_another_export_is_refused(deployed, tmp_path):
    _, folder = deployed
    for name in ("model.onnx", "deployment.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with (tmp_path / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"is not the program that deployment\.json describes"):
        read_folder(tmp_path)


def test_a_program_that_is_not_renamed_yet_is_found(deployed, tmp_path):
    """This is the state of a folder whose program is being replaced."""
    _, folder = deployed
    (tmp_path / "deployment.json").write_bytes((folder / "deployment.json").read_bytes())
    program = (folder / "model.onnx").read_bytes()
    (tmp_path / f"model.onnx.{hashlib.sha256(program).hexdigest()[:16]}").write_bytes(program)
    (tmp_path / "model.onnx").write_text("old")
    session, _ = read_folder(tmp_path)
    assert session.get_inputs()[0].name == "inputs"


def test_exported_programs_and_files_are_saved_too(tmp_path):
    model = perceiver(image()).eval()
    x = drawn(2, 3, 5, 7)
    program = torch.export.export(model, (x,))
    folder = pc.checkpoints.save_program(program, tmp_path / "one", model=model, preprocessing={})
    torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(x), model(x), rtol=1e-5, atol=1e-5)
    copied = pc.checkpoints.save_program(folder / "model.pt2", tmp_path / "two", model=model, preprocessing={})
    assert (copied / "deployment.json").read_text() == (folder / "deployment.json").read_text()


@pytest.mark.refusal
def test_a_full_disk_does_not_end_the_process(tmp_path):
    """PyTorch's writer would, when it is destroyed. A limit of the file size stands for the disk."""
    script = f"""
        import gc, resource, signal, torch, perceiver_core as pc
        audio = pc.adapters.Audio(patch_size=4, positions=None)
        model = pc.Perceiver(audio, pc.Encoder(audio.dim, num_latents=3, dim=8), pc.heads.Identity()).eval()
        program = torch.export.export(model, (torch.zeros(2, 99),))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            pc.checkpoints.save_program(program, {str(tmp_path)!r}, model=model, preprocessing={{}})
        except OSError as error:
            print(error)
        gc.collect()
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "model.pt2 was not written, and existing files are unchanged. Raise the limit" in done.stdout
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_after_an_error(tmp_path):
    model = perceiver(image())
    program = tmp_path / "missing.pt2"
    for preprocessing in ({"mean": torch.zeros(3)}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match="preprocessing must be JSON"):
            pc.checkpoints.save_program(program, tmp_path / "new", model=model, preprocessing=preprocessing)
    with pytest.raises(TypeError, match=r"program must be the result of torch\.onnx\.export .*; got Perceiver"):
        pc.checkpoints.save_program(model, tmp_path / "new", model=model, preprocessing={})
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError):
        pc.checkpoints.save_program(program, tmp_path / "new", model=model, preprocessing={})
    assert list((tmp_path / "new").iterdir()) == []


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    preprocessing = {"mode": "L", "size": [9, 5], "mean": 0, "std": 1}
    levels = np.random.default_rng(1).integers(0, 256, (9, 5)).astype(np.uint8)
    alpha = Image.fromarray(levels)
    exif = Image.Exif()
    exif[0x0112] = 3
    images = {
        "16-bit": (Image.fromarray(levels.astype(np.uint16) * 257), {}, levels),
        "alpha": (Image.merge("LA", [Image.new("L", (5, 9), 255), alpha]), {}, levels),
        "palette": (Image.fromarray(levels % 2 * 255).convert("P"), {"transparency": 255}, levels * 0),
        "rotated": (Image.fromarray(levels), {"exif": exif}, levels[::-1, ::-1]),
    }
    for name, (saved, options, expected) in images.items():
        saved.save(tmp_path / f"{name}.png", **options)
        actual = read_image(tmp_path / f"{name}.png", preprocessing)[0, 0] * 255
        np.testing.assert_allclose(actual, expected, atol=1.01, err_msg=name)
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            read_image(tmp_path / name, preprocessing)


def run(folder: Path, *arguments: str) -> tuple[int, list[str], list[str]]:
    """Return the exit code and the lines of stdout and stderr."""
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def copied(source: Path, folder: Path, program: bytes | None = None, **preprocessing: object) -> Path:
    """Copy a folder with another program or other preprocessing, as save_program would have written it."""
    folder.mkdir()
    program = (source / "model.onnx").read_bytes() if program is None else program
    (folder / "model.onnx").write_bytes(program)
    deployment = json.loads((source / "deployment.json").read_text())
    deployment["sha256"] = {"model.onnx": hashlib.sha256(program).hexdigest()}
    deployment["preprocessing"] = {k: v for k, v in {**PREPROCESSING, **preprocessing}.items() if v is not None}
    (folder / "deployment.json").write_text(json.dumps(deployment))
    return folder


@pytest.mark.refusal
@pytest.mark.parametrize(
    "changed",
    [
        dict.fromkeys(PREPROCESSING),
        {**dict.fromkeys(PREPROCESSING), "sample_rate": 16_000},
        *({key: None} for key in PREPROCESSING),
        *({key: value} for key in PREPROCESSING for value in (["a", 1], "ab", {}, [], True, [[7], 11], float("nan"))),
        {"mode": "P"},
        {"size": [7, 0]},
        {"size": [7, 10**9]},
        {"mean": ["a"]},
        {"mean": [0.5, 0.5]},
        {"std": 0},
        {"std": [1, 1, float("inf")]},
    ],
    ids=str,
)
def test_other_preprocessing_is_refused(deployed, tmp_path, changed):
    with pytest.raises(ValueError, match=r"deployment\.json: preprocessing must have mode"):
        read_folder(copied(deployed[1], tmp_path / "copy", **changed))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("program", "changed", "expected"),
    [
        (b"no program", {}, "is no program of onnxruntime"),
        (None, {"classes": ["ant", "bee"]}, "preprocessing has 2 classes, but the program computes (1, 5)"),
        (None, {"mode": "L", "mean": 0, "std": 1}, "the program cannot be run on image"),
    ],
)
def test_refusals_are_one_line(deployed, picture, tmp_path, program, changed, expected):
    code, output, (line,) = run(copied(deployed[1], tmp_path / "copy", program, **changed), str(picture))
    assert (code, output) == (2, [])
    assert line.startswith("error: ")
    assert expected in line


def test_printed_text_contains_no_control_characters(deployed, picture, tmp_path):
    folder = copied(deployed[1], tmp_path / "copy", classes=["a\x1b[2J\nfake"] * 5)
    assert run(folder, str(picture)) == (0, [r"picture.png a\x1b[2J\nfake"], [])
    assert run(folder, str(picture), "--\x1b[2J")[::2] == (
        2,
        [r"error: unknown arguments --\x1b[2J; pass a folder and image files"],
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_stdout_may_be_closed(deployed, picture):
    for redirection, code in ((">&-", 0), (">/dev/full", 2)):
        if Path("/dev/full").exists() or code == 0:
            command = f'"$0" "$@" {redirection}'
            arguments = ["sh", "-c", command, sys.executable, str(SCRIPT), str(deployed[1]), str(picture)]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
            assert done.returncode == code, done.stderr
            assert len(done.stderr.splitlines()) == (code > 0)
