"""Folders of transformers: shards, files that are not what they say, and models that a configuration does not make."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import reads
from perceiver_core.interop import (
    DEEPMIND_NUMERICS,
    TRANSFORMERS_NUMERICS,
    Numerics,
    convert,
    load_transformers,
    save_transformers,
)
from perceiver_core.interop.published_models import build
from perceiver_core.interop.weight_files import state_dict_files
from tests.interop.haiku_writer import KINDS, SMALL

TEXT = "PerceiverForMaskedLM"
LEARNED = "PerceiverForImageClassificationLearned"
FOURIER = "PerceiverForImageClassificationFourier"
CONV = "PerceiverForImageClassificationConvProcessing"
STEM = "perceiver.input_preprocessor.convnet.conv.weight"
LATENTS = "perceiver.embeddings.latents"
DEEP = DEEPMIND_NUMERICS


def configured(kind: str) -> dict[str, Any]:
    return SMALL | KINDS[kind] | {"architectures": [kind], "model_type": "perceiver"}


def made(kind: str, numerics: Numerics = TRANSFORMERS_NUMERICS, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(configured(kind) | more, numerics)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return written(CONV, tmp_path)


def written(kind: str, path: Path) -> Path:
    return save_transformers(made(kind), path / "theirs", config=configured(kind))


def same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0.0, atol=0.0)


def refused(path: Path, *said: str) -> str:
    """What is said of a folder; each of these among it."""
    with pytest.raises(ValueError) as caught:
        load_transformers(path)
    for words in said:
        assert words in str(caught.value)
    return str(caught.value)


# ---- weights in several files


def sharded(path: Path, end: str) -> dict[str, str]:
    """The weights in a folder in three files, and which is where."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[end]
    places = {name: f"{stem}-0000{i % 3 + 1}-of-00003.{end}" for i, name in enumerate(weights)}
    for file in set(places.values()):
        part = {name: weights[name] for name, place in places.items() if place == file}
        save_file(part, path / file) if end == "safetensors" else torch.save(part, path / file)
    index(path, end, places)
    return places


def index(path: Path, end: str, places: Any) -> None:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[end]
    (path / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_shards(end: str, theirs: Path) -> None:
    whole = load_transformers(theirs)
    places = sharded(theirs, end)
    same(load_transformers(theirs), whole)
    convert(theirs, theirs.parent / "ours")
    same(pc.load(theirs.parent / "ours"), whole)
    file = places[LATENTS]
    index(theirs, end, places | {"more": file})
    refused(theirs, str(theirs / file), "it lacks ['more']")
    index(theirs, end, {name: place for name, place in places.items() if name != LATENTS})
    refused(theirs, str(theirs / file), f"it also holds ['{LATENTS}']")
    index(theirs, end, places)
    (theirs / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {file}, which does not exist"):
        load_transformers(theirs)


ELSEWHERE = ["../x.safetensors", "a/x.safetensors", "/x.safetensors", "..", "x.bin", ".safetensors", ""]
ELSEWHERE += ["a\\x.safetensors", "C:x.safetensors", "\0.safetensors"]


@pytest.mark.parametrize("file", ELSEWHERE)
def test_an_index_names_plain_files_beside_it(file: str, theirs: Path) -> None:
    save_file(load_file(theirs / "model.safetensors"), theirs.parent / "x.safetensors")
    places = sharded(theirs, "safetensors")
    index(theirs, "safetensors", places | {LATENTS: file})
    refused(theirs, "must name files beside it that end in .safetensors")


@pytest.mark.parametrize("places", [None, [], {"a": 3}, "x"])
def test_an_index_of_something_else(places: Any, theirs: Path) -> None:
    sharded(theirs, "safetensors")
    index(theirs, "safetensors", places)
    refused(theirs, "must hold a weight_map")


def test_the_size_of_an_index_is_bounded(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(theirs, "safetensors")
    monkeypatch.setattr(state_dict_files, "LARGEST_INDEX", 100)
    refused(theirs, "model.safetensors.index.json must have at most 100 bytes")


# ---- what PyTorch pickled


def pickled(path: Path, **changes: Any) -> Path:
    weights = load_file(path / "model.safetensors") | changes
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    return path


BAD: dict[str, tuple[Any, str]] = {
    "expanded": (torch.zeros(1).expand(5, 16), "has strides (0, 0)"),
    "a part of more": (torch.zeros(300_000)[:80].view(5, 16).T, "has strides"),
    "meta": (torch.zeros(5, 16, device="meta"), "is on the device meta"),
    "sparse": (torch.eye(5, 16).to_sparse(), "has the layout torch.sparse_coo"),
    "no tensor": (3, "is a int"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch.load's, since PyTorch 2.14
@pytest.mark.parametrize("case", BAD)
def test_tensors_that_a_file_does_not_hold(case: str, theirs: Path) -> None:
    value, message = BAD[case]
    refused(pickled(theirs, **{LATENTS: value}), "pytorch_model.bin", f"{LATENTS} {message}")


def test_tensors_that_share_values_are_not_copied(theirs: Path) -> None:
    many = torch.zeros(40_000)
    refused(
        pickled(theirs, **{f"x{i}": many for i in range(9)}), "is smaller than its tensors, since they share memory"
    )


def test_parameters_and_pictures_laid_out_by_channel(theirs: Path) -> None:
    whole = load_transformers(theirs)
    kernel = whole.adapter.stem.convolution.weight.detach().clone(memory_format=torch.channels_last)
    pickled(theirs, **{STEM: nn.Parameter(kernel), LATENTS: nn.Parameter(whole.encoder.latents.detach())})
    same(load_transformers(theirs), whole)


def test_a_compressed_file_is_not_unpacked(theirs: Path) -> None:
    pickled(theirs)
    with zipfile.ZipFile(theirs / "pytorch_model.bin") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(theirs / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refused(theirs, "is not a complete file of tensors only")


class Touch:
    def __reduce__(self) -> Any:
        return os.mkdir, ("touched",)


def test_a_refusal_gives_no_dangerous_advice(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(theirs.parent)
    said = refused(pickled(theirs, x=Touch()), "is not a complete file of tensors only (UnpicklingError)")
    assert "weights_only" not in said and not Path("touched").exists()


# ---- weights of another model


def changed(path: Path, **changes: Tensor) -> Path:
    save_file(load_file(path / "model.safetensors") | changes, path / "model.safetensors")
    return path


def test_a_kernel_of_another_shape(theirs: Path) -> None:
    kernel = load_file(theirs / "model.safetensors")[STEM]
    said = f"{STEM} has shape (3, 64, 7, 7) torch.float32, not (64, 3, 7, 7)"
    refused(changed(theirs, **{STEM: kernel.transpose(0, 1).contiguous()}), str(theirs / "model.safetensors"), said)


def test_latents_with_an_axis_too_many(theirs: Path) -> None:
    refused(
        changed(theirs, **{LATENTS: torch.zeros(1, 5, 16)}),
        f"{LATENTS} has shape (1, 5, 16) torch.float32, not (5, 16)",
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float16, torch.bool])
def test_weights_of_another_dtype(dtype: torch.dtype, theirs: Path) -> None:
    said = refused(changed(theirs, **{LATENTS: torch.zeros(5, 16).to(dtype)}), str(theirs), str(dtype), LATENTS)
    assert ("Convert them to one" in said) == (dtype == torch.float16)


def test_a_counter_that_does_not_count(theirs: Path) -> None:
    name = "perceiver.input_preprocessor.convnet.batchnorm.num_batches_tracked"
    refused(changed(theirs, **{name: torch.tensor(0.0)}), f"{name} has shape () torch.float32, not () torch.int64")


def test_names_with_a_mark_of_data_parallel(theirs: Path) -> None:
    weights = {f"module.{name}": value for name, value in load_file(theirs / "model.safetensors").items()}
    save_file(weights, theirs / "model.safetensors")
    refused(theirs, str(theirs / "model.safetensors"), "Take off the module. at the start")


def test_half_precision_loads(theirs: Path) -> None:
    weights = load_file(theirs / "model.safetensors")
    weights = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(weights, theirs / "model.safetensors")
    assert load_transformers(theirs).encoder.latents.dtype == torch.bfloat16


# ---- configurations


def reconfigured(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


VALUES: dict[str, tuple[Any, str]] = {
    "architectures": ({"a": 1}, "config must name one of ['PerceiverForMaskedLM'"),
    "architectures of none": (None, "got None"),
    "architectures as a string": ("PerceiverForMaskedLM", "as its architectures, in a list"),
    "architectures of lists": ([["x"]], "got [['x']]"),
    "architectures of another library": (["BertModel"], "got ['BertModel']"),
    "cross_attention_shape_for_attention": ("x", "one of ('kv', 'q'); got 'x'"),
    "hidden_act": (["gelu"], "one of ('gelu', "),
    "id2label": ([1, 2], "id2label as a dictionary of labels; got [1, 2]"),
    "d_latents": ("16", "d_latents as a whole number from 1 to 2147483647; got '16'"),
    "d_latents as a fraction": (16.0, "got 16.0"),
    "num_blocks": (True, "num_blocks as a whole number"),
    "num_self_attends_per_block": (-1, "as a whole number from 0 to"),
    "train_size": (5, "train_size as 2 whole numbers from 1 to 2147483647; got 5"),
    "output_shape": ([1, "a", 2, 3], "output_shape as 4 whole numbers"),
    "use_query_residual": ("no", "use_query_residual as one of (True, False); got 'no'"),
    "attention_probs_dropout_prob": (float("nan"), "as a number in [0, 1); got nan"),
    "num_self_attention_heads": (5, "config makes no PerceiverForImageClassificationConvProcessing: num_heads"),
    "num_latents": (2**31, "num_latents as a whole number"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_of_a_configuration(case: str, theirs: Path) -> None:
    value, message = VALUES[case]
    refused(reconfigured(theirs, **{case.partition(" ")[0]: value}), str(theirs / "config.json"), message)


def test_labels_that_are_not_said_are_two(tmp_path: Path) -> None:
    config = configured(FOURIER) | {"num_labels": 2}
    path = save_transformers(made(FOURIER, num_labels=2), tmp_path / "two", config=config)
    assert load_transformers(reconfigured(path, id2label=None)).decoder.out_dim == 2
    assert load_transformers(reconfigured(path, id2label={"0": "a", "1": "b"}, num_labels=7)).decoder.out_dim == 2


def test_sizes_that_transformers_does_not_have_are_ignored(tmp_path: Path) -> None:
    whole = load_transformers(written(FOURIER, tmp_path))
    same(load_transformers(reconfigured(tmp_path / "theirs", num_bands=3, max_resolution="x")), whole)


def test_sizes_that_overflow(tmp_path: Path) -> None:
    kind = "PerceiverForMultimodalAutoencoding"
    refused(reconfigured(written(kind, tmp_path), num_labels=2**31 - 1), "config makes no", "overflow")


TEXTS: dict[str, tuple[bytes, str]] = {
    "deep": (b"[" * 200_000, "not valid JSON"),
    "deep and whole": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", "not valid JSON in UTF-8"),
    "cut": (b'{"architectures": ["Per', "not valid JSON"),
    "huge": (b" " * (2**20 + 1), "must have at most 1048576 bytes"),
    "a list": (b"[]", "must hold a dictionary; got list"),
    "a number of many digits": (b'{"d_latents": ' + b"9" * 6000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_of_a_configuration(case: str, theirs: Path) -> None:
    text, message = TEXTS[case]
    (theirs / "config.json").write_bytes(text)
    refused(theirs, str(theirs / "config.json"), message)


@pytest.mark.parametrize("layers", [30, 10_000, 2**31 - 1])
def test_layers_that_there_are_no_weights_for(layers: int, theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perceiver_core.interop.transformers.build", lambda *_: pytest.fail("made a model"))
    refused(reconfigured(theirs, num_self_attends_per_block=layers), str(theirs / "model.safetensors"))


# ---- models that a configuration does not make


def not_written(message: str, model: Any, config: Any, tmp_path: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        save_transformers(model, tmp_path / "out", config=config, **options)
    assert not (tmp_path / "out").exists()


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "num_self_attention_heads": ({"num_self_attention_heads": 2}, "encoder.num_heads is 4, not 2"),
    "num_blocks": ({"num_blocks": 3}, "repeats is 2, not 3"),
    "use_query_residual": ({"use_query_residual": False}, "residual is True, not False"),
    "hidden_act": ({"hidden_act": "relu"}, "mlp.activation is GELU of .*, not ReLU of"),
    "num_latents": ({"num_latents": 99}, "latents is 5, not 99"),
    "labels": ({"id2label": {"0": "a"}}, "decoder.out_dim is 3, not 1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_model_of_another_configuration(case: str, tmp_path: Path) -> None:
    changes, message = OTHERS[case]
    not_written(message, made(FOURIER), configured(FOURIER) | changes, tmp_path)


@pytest.mark.refusal
def test_a_model_that_was_changed(tmp_path: Path) -> None:
    model = made(TEXT)
    model.head.vectors = nn.Parameter(model.head.vectors.detach().clone())
    not_written("head.vectors and adapter.vectors are two tensors, not one", model, configured(TEXT), tmp_path)
    model = made(FOURIER)
    model.decoder.output = nn.Linear(16, 4)
    not_written("decoder.output", model, configured(FOURIER), tmp_path)
    not_written("model must be a torch.nn.Module; got int", 3, configured(FOURIER), tmp_path)
    model = made(FOURIER)
    model.decoder.half()
    not_written(
        r"one floating point dtype; got \['torch.float16', 'torch.float32'\]", model, configured(FOURIER), tmp_path
    )
    with torch.device("meta"):
        model = build(configured(FOURIER))
    not_written("meta device", model, configured(FOURIER), tmp_path)


def test_a_path_changes_no_result(tmp_path: Path) -> None:
    model = made(FOURIER)
    reads.set_strategy(model, reads.Dense())
    same(load_transformers(save_transformers(model, tmp_path, config=configured(FOURIER))), model)


@pytest.mark.parametrize("kind", [CONV, LEARNED, FOURIER])
def test_numerics_that_were_not_said(kind: str, tmp_path: Path) -> None:
    not_written("that config and numerics describe", made(kind, DEEP), configured(kind), tmp_path)


@pytest.mark.parametrize("kind", [CONV, LEARNED])
def test_numerics_that_transformers_has_no_word_for(kind: str, tmp_path: Path) -> None:
    message = {CONV: "adapter.stem.*ConvStem", LEARNED: "decoder.cross_attention.residual is False, not True"}[kind]
    not_written(f"cannot express.*{message}", made(kind, DEEP), configured(kind), tmp_path, numerics=DEEP)
    turned = TRANSFORMERS_NUMERICS._replace(transposed_stem=True)
    if kind == CONV:
        not_written(
            "the kernel of its stem is transposed", made(kind, turned), configured(kind), tmp_path, numerics=turned
        )


def test_activations_are_written_by_name(tmp_path: Path) -> None:
    path = save_transformers(made(FOURIER, DEEP), tmp_path, config=configured(FOURIER), numerics=DEEP)
    assert state_dict_files.read_json(path / "config.json")["hidden_act"] == "gelu_pytorch_tanh"
    assert load_transformers(path).encoder.reads[0].mlp.activation.approximate == "tanh"


class Configuration:
    """Stands for transformers' own."""

    def to_dict(self) -> dict[str, Any]:
        return configured(FOURIER)


def test_what_a_configuration_may_come_as(theirs: Path, tmp_path: Path) -> None:
    path = written(FOURIER, tmp_path / "fourier")
    for i, config in enumerate([path, str(path), path / "config.json", Configuration()]):
        same(load_transformers(save_transformers(made(FOURIER), tmp_path / f"{i}", config=config)), made(FOURIER))
    not_written("config must be a dictionary, a configuration of transformers or the path", made(FOURIER), 3, tmp_path)
    not_written("JSON can express", made(FOURIER), configured(FOURIER) | {"x": object()}, tmp_path)
    with pytest.raises(FileNotFoundError):
        save_transformers(made(FOURIER), tmp_path / "out", config=tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    config = configured(CONV) | {"torch_dtype": "float16", "id2label": {"0": "größer", "1": "b", "2": "c"}}
    path = save_transformers(made(CONV).to(dtype), tmp_path, config=config)
    found = state_dict_files.read_json(path / "config.json")
    assert found["dtype"] == str(dtype).removeprefix("torch.") and "torch_dtype" not in found
    assert found["id2label"]["0"] == "größer" and "größer" in (path / "config.json").read_bytes().decode()


# ---- writing


@pytest.mark.parametrize("where", ["save_file", "os.replace"])
def test_a_failure_leaves_the_old_files_and_no_others(
    where: str, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    name = "perceiver_core.interop.transformers.save_file" if where == "save_file" else "os.replace"
    monkeypatch.setattr(name, fail)
    with pytest.raises(OSError, match="full"):
        save_transformers(made(CONV), theirs, config=configured(CONV))
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_files_have_the_modes_that_the_user_has_set(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = written(CONV, tmp_path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}


def test_it_is_saved_as_ours_and_written_again(theirs: Path, tmp_path: Path) -> None:
    again = pc.load(pc.save(load_transformers(theirs), tmp_path / "ours"))
    path = save_transformers(again, tmp_path / "again", config=theirs)
    # safetensors writes the entries of the metadata in random order, so that bytes may differ.
    with safe_open(path / "model.safetensors", "pt") as one, safe_open(theirs / "model.safetensors", "pt") as other:
        names = set(one.keys())
        assert (names, one.metadata()) == (set(other.keys()), other.metadata())
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in names)
