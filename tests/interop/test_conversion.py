"""`python -m perceiver_core convert`: every source and target, what is refused, and that nothing is half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import perceiver_core as pc
from perceiver_core.__main__ import main
from perceiver_core.interop import DEEPMIND_NUMERICS, convert, load_transformers, reference_run, save_transformers
from perceiver_core.interop.conversion import detect_format
from perceiver_core.interop.published_models import build
from tests.interop.haiku_writer import KINDS, SMALL, Haiku, original

FOURIER = "PerceiverForImageClassificationFourier"
CONV = "PerceiverForImageClassificationConvProcessing"
LUCID = {
    "num_freq_bands": 3, "depth": 2, "max_freq": 7.0, "num_latents": 5, "latent_dim": 12, "latent_heads": 2,
    "latent_dim_head": 8, "cross_dim_head": 8, "num_classes": 3, "weight_tie_layers": False,
}  # fmt: skip
TOLD = {"num_blocks": 2, "num_self_attention_heads": 4}


def configured(kind: str) -> dict[str, Any]:
    return SMALL | KINDS[kind] | {"architectures": [kind], "model_type": "perceiver"}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder that transformers loads."""
    torch.manual_seed(0)
    return save_transformers(build(configured(FOURIER)), tmp_path / "theirs", config=configured(FOURIER))


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """A file of DeepMind's parameters."""
    return haiku(FOURIER, tmp_path)


def haiku(kind: str, folder: Path, **sizes: Any) -> Path:
    found = Haiku(kind, original(kind, **sizes)[1]).found
    flat = {f"{scope}/{name}": array for scope, parameters in found.items() for name, array in parameters.items()}
    np.savez(folder / "weights.npz", **flat)
    return folder / "weights.npz"


@pytest.fixture
def lucid(tmp_path: Path) -> Path:
    """A file of perceiver-pytorch's weights."""
    library = pytest.importorskip("perceiver_pytorch")
    torch.manual_seed(0)
    save_file(library.Perceiver(**LUCID).state_dict(), tmp_path / "lucid.safetensors")
    return tmp_path / "lucid.safetensors"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["perceiver_core", "convert", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says where it cannot do what is asked for, which leaves nothing behind."""
    before = {path: path.stat().st_mtime_ns for path in Path(str(arguments[1])).parent.rglob("*")}
    assert command(monkeypatch, *arguments) == 2
    assert {path: path.stat().st_mtime_ns for path in Path(str(arguments[1])).parent.rglob("*")} == before
    return capsys.readouterr().err


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0.0, atol=0.0)
    assert str(one) == str(other)


def pictures() -> Tensor:
    return torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(1))


def test_transformers_to_ours(theirs, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, theirs, tmp_path / "ours") == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'ours'}\n"
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert 'from_pretrained("ours")' in (tmp_path / "ours" / "README.md").read_text()
    same(pc.load(tmp_path / "ours"), load_transformers(theirs))
    assert command(monkeypatch, theirs, tmp_path / "deep", "--numerics", "deepmind") == 0
    same(pc.load(tmp_path / "deep"), load_transformers(theirs, numerics=DEEPMIND_NUMERICS))


def test_deepmind_to_ours(arrays, tmp_path, monkeypatch):
    (tmp_path / "told.json").write_text(json.dumps(TOLD))
    for given in (json.dumps(TOLD), tmp_path / "told.json"):
        out = tmp_path / "made" / f"{len(str(given))}"
        assert command(monkeypatch, arrays, out, "--arguments", given) == 0
        same(pc.load(out), original(FOURIER)[0])


def test_deepmind_to_transformers_and_back(tmp_path, monkeypatch):
    told = ["--to", "transformers", "--arguments", json.dumps(TOLD)]
    assert command(monkeypatch, haiku(FOURIER, tmp_path), tmp_path / "theirs", *told) == 0
    same(load_transformers(tmp_path / "theirs"), original(FOURIER)[0])
    same(load_transformers(tmp_path / "theirs", numerics=DEEPMIND_NUMERICS), original(FOURIER)[0])
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == "perceiver" and config["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize("kind", [CONV, "PerceiverForImageClassificationLearned"])
def test_what_transformers_has_no_word_for_is_written_as_it_computes_alone(kind, tmp_path, monkeypatch, capsys):
    path = haiku(kind, tmp_path)
    told = ["--to", "transformers", "--arguments", json.dumps(TOLD)]
    assert "cannot express what this model computes" in refused(monkeypatch, capsys, path, tmp_path / "theirs", *told)
    assert command(monkeypatch, path, tmp_path / "theirs", *told, "--numerics", "transformers") == 0


def test_other_sizes_of_fourier_features_are_converted_to_ours_alone(tmp_path, monkeypatch, capsys):
    sizes = {"num_bands": 6, "max_resolution": [5, 7]}
    path, given = haiku(FOURIER, tmp_path, **sizes), json.dumps(TOLD | {"max_resolution": [5, 7]})
    assert command(monkeypatch, path, tmp_path / "ours", "--arguments", given) == 0
    same(pc.load(tmp_path / "ours"), original(FOURIER, **sizes)[0])
    said = refused(monkeypatch, capsys, path, tmp_path / "theirs", "--arguments", given, "--to", "transformers")
    assert "transformers cannot express what this model computes: adapter.positions.num_bands is 6, not 64" in said


def test_published_sizes_of_fourier_features_are_written_for_transformers(tmp_path, monkeypatch):
    given = json.dumps(TOLD | {"num_bands": 64, "max_resolution": [224, 224]})
    told = ["--to", "transformers", "--arguments", given]
    assert command(monkeypatch, haiku(FOURIER, tmp_path), tmp_path / "theirs", *told) == 0
    assert not {"num_bands", "max_resolution"} & json.loads((tmp_path / "theirs" / "config.json").read_text()).keys()


def test_perceiver_pytorch_to_ours(lucid, tmp_path, monkeypatch):
    assert command(monkeypatch, lucid, tmp_path / "ours", "--arguments", json.dumps(LUCID)) == 0
    same(pc.load(tmp_path / "ours"), pc.interop.load_perceiver_pytorch(lucid, **LUCID))


def test_ours_to_transformers(theirs, tmp_path, monkeypatch):
    pc.save(load_transformers(theirs), tmp_path / "ours")
    (tmp_path / "again").mkdir()  # an empty folder may be there
    told = ["--to", "transformers", "--arguments", theirs / "config.json"]
    assert command(monkeypatch, tmp_path / "ours", tmp_path / "again", *told) == 0
    wanted, found = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "again"))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)
    wanted = configured(FOURIER) | {"hidden_act": "gelu", "dtype": "float32"}
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == wanted


def test_a_name_on_the_hub_is_fetched(theirs, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **told: asked.append((name, told)) or str(theirs))
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "me/perceiver", "ours") == 0
    safe = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    assert asked == [("me/perceiver", {"allow_patterns": ["config.json", *safe]})]
    same(pc.load(tmp_path / "ours"), load_transformers(theirs))
    torch.save(load_file(theirs / "model.safetensors"), theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    same(load_transformers("me/perceiver"), pc.load(tmp_path / "ours"))
    old = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
    assert asked[2:] == [("me/perceiver", {"allow_patterns": ["config.json", *old]})]


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_run_beside_ours(kind, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = save_transformers(build(configured(kind)), tmp_path / "theirs", config=configured(kind))
    assert command(monkeypatch, theirs, tmp_path / "ours", "--check") == 0
    said = capsys.readouterr().out
    assert float(said.split("original: ")[1].split(" standard deviations of its output\n")[0]) < 1e-9
    assert "written" in said and torch.get_default_dtype() == torch.float32
    told = ["--check", "--to", "transformers", "--arguments", theirs / "config.json"]
    assert command(monkeypatch, tmp_path / "ours", tmp_path / "again", *told) == 0


def test_what_deepmind_wrote_is_checked_as_transformers_reads_it(arrays, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    told = ["--to", "transformers", "--numerics", "transformers", "--arguments", json.dumps(TOLD), "--check"]
    assert command(monkeypatch, arrays, tmp_path / "theirs", *told) == 0
    told = ["--to", "transformers", "--arguments", json.dumps(TOLD), "--check"]  # DeepMind's GELU has a name there
    assert command(monkeypatch, arrays, tmp_path / "deep", *told) == 0


def test_perceiver_pytorch_is_run_beside_ours(lucid, tmp_path, monkeypatch, capsys):
    told = ["--arguments", json.dumps(LUCID), "--check"]
    assert command(monkeypatch, lucid, tmp_path / "ours", *told) == 0
    assert "largest difference" in capsys.readouterr().out
    less = json.dumps({name: value for name, value in LUCID.items() if name != "depth"})
    said = refused(monkeypatch, capsys, lucid, tmp_path / "more", "--check", "--arguments", less)
    assert "arguments must be all that their constructor needs" in said


def test_perceiver_io_of_perceiver_pytorch_is_run_beside_ours(tmp_path, monkeypatch):
    library = pytest.importorskip("perceiver_pytorch")
    told = {"depth": 1, "dim": 7, "queries_dim": 11, "logits_dim": 3, "num_latents": 5, "latent_dim": 12}
    save_file(library.PerceiverIO(**told).state_dict(), tmp_path / "io.safetensors")
    arguments = ["--check", "--arguments", json.dumps(told)]
    assert command(monkeypatch, tmp_path / "io.safetensors", tmp_path / "ours", *arguments) == 0


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_too_large_a_difference_writes_nothing(difference, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference_run, "transformers", lambda folder, ours: difference)
    assert command(monkeypatch, theirs, tmp_path / "ours", "--check") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    assert convert(theirs, tmp_path / "ours", check=True, tolerance=1.0) is not None


def test_a_difference_is_found(theirs, tmp_path):
    pytest.importorskip("transformers")
    ours = load_transformers(theirs).double().requires_grad_(False)
    picture = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    deviation = ours(picture.double()).std(correction=0)
    with torch.no_grad():
        ours.decoder.output.bias[1] += 0.25
    assert reference_run.transformers(theirs, ours) == pytest.approx(0.25 / float(deviation), rel=0.05)


def test_a_difference_of_small_outputs_is_found(tmp_path):
    """Flow is a hundredth of what the decoder gives."""
    pytest.importorskip("transformers")
    told = configured("PerceiverForOpticalFlow")
    torch.manual_seed(0)
    theirs = save_transformers(build(told), tmp_path / "theirs", config=told)
    ours = load_transformers(theirs)
    assert reference_run.transformers(theirs, ours) < 1e-9
    for attention in (block.attention for block in ours.encoder.transformers[0].blocks):
        attention.num_heads = attention.num_kv_heads = 2
    assert reference_run.transformers(theirs, ours) > 1e-4


def test_one_value_alone_has_no_deviation():
    one = torch.tensor([[4.0]])
    assert (
        reference_run.largest_difference(one, one + 2.0) == 0.5
        and reference_run.largest_difference(0 * one, one) == 4.0
    )
    assert np.isnan(reference_run.largest_difference({"a": one, "b": one}, {"a": one, "b": one * float("nan")}))


def test_a_check_of_text_hides_tokens_anywhere(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = "PerceiverForMaskedLM"
    theirs = save_transformers(build(configured(kind)), tmp_path / "theirs", config=configured(kind))
    ours = load_transformers(theirs)
    assert reference_run.transformers(theirs, ours) < 1e-9
    ours.adapter.positions_include_padding = False
    assert reference_run.transformers(theirs, ours) > 1e-3


@pytest.mark.parametrize("library", ["transformers", "perceiver_pytorch"])
def test_errors_where_the_original_is_not_installed(library, theirs, lucid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("perceiver_core.interop.conversion._read", lambda *_: pytest.fail("read before it was sought"))
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    source = [theirs] if library == "transformers" else [lucid]
    told = ["--arguments", json.dumps(LUCID)] * (library == "perceiver_pytorch")
    said = refused(monkeypatch, capsys, *source, tmp_path / "out", "--check", *told)
    assert f"--check runs the original model; pip install {library.replace('_', '-')}" in said


REFUSED = {
    "nowhere": (["nowhere.npz", "out"], "must be a folder, or owner/name on the hub"),
    "a destination that is there": (["theirs", "full"], "destination must be a new or an empty folder"),
    "a destination that is a file": (
        ["theirs", "junk.bin"],
        "destination must be a new or an empty folder; junk.bin is a file",
    ),
    "junk": (["junk.bin", "out"], "no safetensors file, no .npz and no pickle"),
    "a zip file": (["file.pt", "out"], "read it by torch.load with weights_only=True"),
    "other weights": (["other.safetensors", "out"], "holds weights of no known model"),
    "weights without a configuration": (["theirs/model.safetensors", "out"], "give their folder"),
    "a pickle of something else": (["bad.pystate", "out"], "is not a pickle of dictionaries and arrays"),
    "another folder": (["other", "out"], "written neither by perceiver-core nor by transformers"),
    "a folder without a configuration": (["full", "out"], "must hold config.json"),
    "another kind than told": (["theirs", "out", "--from", "perceiver-pytorch"], "give the path of a safetensors file"),
    "truncated weights": (["cut", "out"], "is not a complete safetensors file"),
    "truncated weights of old": (["old", "out"], "is not a complete file of tensors only"),
    "half of the parameters": (["half.npz", "out"], "must hold a published Perceiver IO; it lacks"),
    "arguments that are none": (["theirs", "out", "--arguments", "[3]"], "must be a JSON object"),
    "arguments of another type": (["theirs", "out", "--arguments", "list.json"], "must be a JSON object; got a list"),
    "arguments that are misspelled": (
        ["arrays.npz", "out", "--arguments", '{"num_self_attention_headz": 4}'],
        "has no ['num_self_attention_headz']",
    ),
    "arguments for transformers": (["theirs", "out", "--arguments", '{"a": 1}'], "config.json has all values"),
    "ours to ours": (["ours", "out"], "is perceiver-core's already"),
    "ours without a configuration": (["ours", "out", "--to", "transformers"], "arguments must be given"),
    "ours of another kind": (
        ["ours", "out", "--to", "transformers", "--arguments", json.dumps(configured("PerceiverForOpticalFlow"))],
        "adapter is Image of ['num_channels', 'positions'], not FramePair of ['positions']",
    ),
    "ours of another size": (
        ["ours", "out", "--to", "transformers", "--arguments", json.dumps(configured(FOURIER) | {"num_labels": 7})],
        "decoder.out_dim is 3, not 7",
    ),
    "a check of DeepMind's code": (["arrays.npz", "out", "--check"], "cannot run DeepMind's code"),
    "a check with other numerics": (
        ["theirs", "out", "--check", "--numerics", "deepmind"],
        "give --numerics transformers",
    ),
}


def test_a_link_to_where_a_folder_can_be_is_followed(theirs, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for place in ("empty", "not_there"):
        link = tmp_path / f"link_to_{place}"
        link.symlink_to(tmp_path / place)
        assert command(monkeypatch, theirs, link) == 0
        assert link.is_symlink()
        same(pc.load(tmp_path / place), load_transformers(theirs))


PLACES = {
    "loop": "is a link to itself",
    "file/inner": "destination must be in a folder that can be written to",
    "link_to_full": "is not empty",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_destination_that_cannot_be_is_refused_before_the_work(place, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("perceiver_core.interop.conversion._read", lambda *_: pytest.fail("read before it was refused"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link_to_full").symlink_to(theirs)
    assert command(monkeypatch, theirs, tmp_path / place) == 2
    assert PLACES[place] in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [KeyError("x"), AttributeError("x"), RecursionError("x"), MemoryError("x"), EOFError()]
)
def test_a_reader_that_runs_into_something_says_so(error, theirs, tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("perceiver_core.interop.conversion._read", fail)
    said = " ".join(refused(monkeypatch, capsys, theirs, tmp_path / "out").split())
    assert f"theirs cannot be read ({type(error).__name__}: {error})" in said


BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "a zip file of nothing": ({"x.npz": b"PK\x05\x06" + b"\0" * 18}, "x.npz"),
    "a broken zip file": ({"x.npz": b"PK\x03\x04" + b"\0" * 40 + b"PK\x05\x06" + b"\1" * 18}, "x.npz"),
    "an empty pickle": ({"x.pystate": b"\x80\x02}q\x00X\x06\x00\x00\x00paramsq\x01Ns."}, "x.pystate"),
    "architectures": ({"x/config.json": b'{"architectures": {"a": 1}}', "x/model.safetensors": b""}, "x"),
    "a deep configuration": ({"x/config.json": b"[" * 200_000}, "x"),
    "no UTF-8": ({"x/config.json": b"\xff\xfe{}"}, "x"),
}


@pytest.mark.parametrize("case", BAD)
def test_no_bad_input_ends_in_a_traceback(case, tmp_path, monkeypatch, capsys):
    contents, source = BAD[case]
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert "error: " in refused(monkeypatch, capsys, tmp_path / source, tmp_path / "out")


def test_arguments_that_are_no_json(theirs, tmp_path, monkeypatch, capsys):
    for text in ('{"a":' * 100_000, "x" * 5000, str(tmp_path), "nowhere.json"):
        assert "must be a JSON object" in refused(monkeypatch, capsys, theirs, tmp_path / "out", "--arguments", text)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing_behind(case, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pc.save(load_transformers(theirs), tmp_path / "ours")
    haiku(FOURIER, tmp_path).rename("arrays.npz")
    with np.load("arrays.npz") as file:
        np.savez("half.npz", **{name: file[name] for name in file.files if "pos_embs" not in name})
    for name in ("full", "other", "cut", "old"):
        Path(name).mkdir()
    for name, text in (("full/x", "x"), ("other/config.json", "{}"), ("junk.bin", "junk"), ("list.json", "[3]")):
        Path(name).write_text(text)
    for name in ("cut", "old"):
        Path(name, "config.json").write_bytes((theirs / "config.json").read_bytes())
    Path("cut/model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-100])
    Path("old/pytorch_model.bin").write_bytes(b"\x80\x02}q")
    Path("bad.pystate").write_bytes(b"\x80\x04junk")
    torch.save({"x": torch.zeros(3)}, "file.pt")
    save_file({"x": torch.zeros(3)}, "other.safetensors")
    arguments, message = REFUSED[case]
    assert message in " ".join(refused(monkeypatch, capsys, *arguments).split())


def test_perceiver_pytorch_has_no_counterpart_in_transformers(lucid, tmp_path, monkeypatch, capsys):
    for told in (["--to", "transformers"], ["--numerics", "deepmind"]):
        said = refused(monkeypatch, capsys, lucid, tmp_path / "out", *told)
        assert "no counterpart in transformers, and no choice of numerics" in said
    said = refused(monkeypatch, capsys, lucid, tmp_path / "out", "--arguments", '{"max_freq": 7.0, "color": 3}')
    assert "takes no ['color']" in said


def test_errors_of_a_plan_name_what_is_known(theirs, tmp_path):
    for name in ("source_format", "target", "numerics"):
        with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\); got 'jax'"):
            convert(theirs, tmp_path / "out", **{name: "jax"})


def test_a_failure_while_writing_leaves_nothing(theirs, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("perceiver_core.interop.conversion.card", fail)
    with pytest.raises(OSError, match="full"):
        convert(theirs, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_what_is_there_says_whose_it_is(theirs, arrays, lucid, tmp_path):
    ours = pc.save(load_transformers(theirs), tmp_path / "ours")
    assert [detect_format(path) for path in (ours, theirs, arrays, lucid)] == [
        "perceiver-core", "transformers", "haiku", "perceiver-pytorch",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        detect_format(tmp_path / "nowhere")
