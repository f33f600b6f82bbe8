"""Values of weights from other libraries: dtypes that differ, numbers that are not finite, names that are printed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perceiver_core.interop import convert, load_haiku, load_perceiver_pytorch, load_transformers
from perceiver_core.interop.weight_files.weight_checks import check_finite, check_floats
from tests.robustness import damaged_sources
from tests.robustness.damaged_sources import GIVEN

pytestmark = [pytest.mark.refusal, pytest.mark.no_shape_checks]
NAN, INFINITE = float("nan"), float("inf")


def of_safetensors(file: Path, change: Callable[[str, Any], Any]) -> None:
    save_file({name: torch.as_tensor(change(name, t)) for name, t in load_file(file).items()}, file)


def of_binary(file: Path, change: Callable[[str, Any], Any]) -> None:
    torch.save({name: change(name, t) for name, t in torch.load(file, weights_only=True).items()}, file)


def of_npz(file: Path, change: Callable[[str, Any], Any]) -> None:
    with np.load(file) as arrays:
        changed = {name: change(name, torch.from_numpy(array)).numpy() for name, array in arrays.items()}
    np.savez(file, **changed)


def of_pickle(file: Path, change: Callable[[str, Any], Any]) -> None:
    scopes = pickle.loads(file.read_bytes())
    for scope, arrays in scopes.items():
        for name, array in arrays.items():
            arrays[name] = change(f"{scope}/{name}", torch.from_numpy(array)).numpy()
    file.write_bytes(pickle.dumps(scopes))


def haiku(path: Path) -> torch.nn.Module:
    (file,) = path.iterdir()
    return load_haiku(file, **GIVEN)


def perceiver_pytorch(path: Path) -> torch.nn.Module:
    return load_perceiver_pytorch(path / "lucid.safetensors", max_freq=10.0, cross_heads=2)


# Format of `damaged_sources`: function that changes a file, the file, the loader, and the names of two weights.
TRANSFORMERS = "perceiver.embeddings.latents", "perceiver.decoder.decoder.final_layer.bias"
HAIKU = "perceiver_encoder/~/trainable_position_encoding/pos_embs", "perceiver_encoder/~/cross_attention/mlp/linear/b"
FORMATS: dict[str, tuple[Any, str, Callable[[Path], torch.nn.Module], tuple[str, str]]] = {
    "transformers": (of_safetensors, "model.safetensors", load_transformers, TRANSFORMERS),
    "transformers shards": (of_safetensors, "model-0000*.safetensors", load_transformers, TRANSFORMERS),
    "transformers .bin": (of_binary, "pytorch_model.bin", load_transformers, TRANSFORMERS),
    "transformers .bin shards": (of_binary, "pytorch_model-0000*.bin", load_transformers, TRANSFORMERS),
    "npz": (of_npz, "weights.npz", haiku, HAIKU),
    "pickle": (of_pickle, "weights.pystate", haiku, HAIKU),
    "perceiver-pytorch": (of_safetensors, "lucid.safetensors", perceiver_pytorch,
                          ("latents", "layers.0.cross_ff.norm.bias")),
}  # fmt: skip


@pytest.fixture(params=FORMATS)
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[[int, Any], Any]], tuple[Any, Any]]:
    """Function that changes two weights, numbers 0 and 1. It returns a function that loads the file, and the names."""
    write, pattern, load, names = FORMATS[request.param]
    damaged_sources.copy(request.param, tmp_path)

    def change(make: Callable[[int, Any], Any]) -> tuple[Any, Any]:
        for file in tmp_path.glob(pattern):
            write(file, lambda name, t: make(names.index(name), t.clone()) if name in names else t)
        return lambda: load(tmp_path), names

    return change


def test_numbers_that_are_not_finite_are_reported_by_name(changed) -> None:
    def make(index: int, tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[: index + 1] = (NAN, -INFINITE)[index]
        return tensor

    load, names = changed(make)
    with pytest.raises(ValueError, match=r"weights must be finite numbers; .* Copy the file again") as caught:
        load()
    assert f"{names[0]} (1 NaN of " in str(caught.value) and f"{names[1]} (2 infinite of " in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_several_dtypes_are_named(dtype: torch.dtype, changed) -> None:
    load, names = changed(lambda index, tensor: tensor.to(dtype))
    with pytest.raises(ValueError, match=r"must be of the dtype of the other weights, torch\.float32") as caught:
        load()
    widest = torch.promote_types(dtype, torch.float32)
    assert all(name in str(caught.value) for name in (*names, f"t.to({widest})"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_weights_that_are_not_of_floating_point_are_named(dtype: torch.dtype, changed) -> None:
    load, names = changed(lambda index, tensor: tensor.to(dtype) if index == 1 else tensor)
    with pytest.raises(ValueError, match=r"must be of a floating point dtype|weights do not fit the model") as caught:
        load()
    assert names[1] in str(caught.value) and str(dtype) in str(caught.value)


def test_a_state_dict_in_memory_is_checked_too() -> None:
    weights = load_file(damaged_sources.base("perceiver-pytorch").folder / "lucid.safetensors")
    weights["latents"][2, 3] = NAN
    with pytest.raises(ValueError, match=r"^weights must be finite numbers; latents \(1 NaN of 84 values\)"):
        load_perceiver_pytorch(weights, max_freq=10.0, cross_heads=2)
    with pytest.raises(ValueError, match=r"1 weights are|latents must be of the dtype of the other weights"):
        load_perceiver_pytorch(weights | {"latents": torch.zeros(7, 12).half()}, max_freq=10.0, cross_heads=2)


def test_long_lists_are_shortened() -> None:
    tensors = {f"w{i}": torch.full((2,), NAN if i % 2 else INFINITE) for i in range(9)}
    with pytest.raises(ValueError, match=r"w4 \(2 infinite of 2 values\) and 4 more\. "):
        check_finite(tensors)
    check_finite({"meta": torch.empty(3, device="meta"), "counter": torch.tensor(3), "none": torch.zeros(0)})


def test_the_widest_dtype_keeps_the_values_of_all() -> None:
    with pytest.raises(
        ValueError, match=r"2 weights are of torch\.float16; .* torch\.bfloat16: c\. .* torch\.float32,"
    ):
        check_floats({"a": torch.zeros(1).half(), "b": torch.zeros(1).half(), "c": torch.zeros(1).bfloat16()})


def test_names_in_messages_are_printable_and_short(tmp_path: Path) -> None:
    """A name can contain characters that clear a terminal, or pretend to be lines of other output."""
    file = tmp_path / "\x1b[2Jit\nwritten: ours"
    name = "\x1b]0;title\x07\u202e\n" + "a" * 100_000
    save_file(
        {name: torch.zeros(2), **load_file(damaged_sources.base("perceiver-pytorch").folder / "lucid.safetensors")},
        file,
    )
    for load in (
        lambda: load_perceiver_pytorch(file, max_freq=10.0, cross_heads=2),
        lambda: convert(file, tmp_path / "o"),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 3000
        assert r"\x1b[2Jit" in str(caught.value) and caught.value.__suppress_context__
    with pytest.raises(FileNotFoundError, match=r"\\x1b\[31m does not exist"):
        load_perceiver_pytorch(tmp_path / "\x1b[31m", max_freq=10.0)


def test_a_folder_of_two_saves_is_refused(tmp_path: Path) -> None:
    """Weights of one save and the configuration of another one, as after a crash between the two renames."""
    damaged_sources.copy("transformers", tmp_path)
    config = (tmp_path / "config.json").read_text()
    for changed in ('"num_blocks": 2', '"hidden_act": "relu"', '"num_self_attention_heads": 1'):
        key = changed.partition(":")[0]
        lines = [f"  {changed}," if line.strip().startswith(key) else line for line in config.splitlines()]
        (tmp_path / "config.json").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=r"model\.safetensors: it is damaged, or config\.json is not the one"):
            load_transformers(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("{", '{"id2label": {"0": "a", "1": "b", "2": "c"},', 1))
    load_transformers(tmp_path)  # entries that outputs do not depend on may be changed


def test_a_flipped_bit_in_weights_of_save_transformers_is_noticed(tmp_path: Path) -> None:
    damaged_sources.copy("transformers", tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="it is damaged, or"):
        load_transformers(tmp_path)
    of_safetensors(tmp_path / "model.safetensors", lambda name, tensor: tensor)  # without the digest
    load_transformers(tmp_path)
