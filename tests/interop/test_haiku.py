"""DeepMind's parameters: names and layouts as Haiku writes them, pickles that cannot do harm."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perceiver_core.interop import load_haiku
from tests.interop.haiku_writer import KINDS, Haiku, original

GIVEN = ("num_blocks", "num_self_attention_heads", "num_cross_attention_heads", "image_size", "train_size",
         "num_frames", "audio_samples_per_frame", "output_shape", "max_resolution")  # fmt: skip


def same(kind: str, path: Path, **sizes: Any) -> None:
    model, _, config = original(kind, **sizes)
    again = load_haiku(path, **{name: config[name] for name in GIVEN if name in config})
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0.0, atol=0.0, msg=name)
    assert str(again) == str(model)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_arrays_by_name(kind: str, tmp_path: Path) -> None:
    found = Haiku(kind, original(kind)[1]).found
    flat = {f"{scope}/{name}": array for scope, parameters in found.items() for name, array in parameters.items()}
    np.savez(tmp_path / "weights.npz", **flat)
    same(kind, tmp_path / "weights.npz")


def test_the_published_pickle(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Haiku's own mapping, which need not be installed to read it; with statistics where there are some."""
    module = types.ModuleType("haiku._src.data_structures")

    class FlatMapping(dict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            return FlatMapping, (dict(self),)

    FlatMapping.__module__, FlatMapping.__qualname__ = module.__name__, "FlatMapping"
    module.FlatMapping = FlatMapping  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name in ("haiku", "haiku._src", module.__name__):
            patch.setitem(sys.modules, name, module)
        found = Haiku(kind, original(kind)[1]).found
        state = {scope: found.pop(scope) for scope in list(found) if "_ema" in scope}
        params = FlatMapping({scope: FlatMapping(parameters) for scope, parameters in found.items()})
        (tmp_path / "it.pystate").write_bytes(
            pickle.dumps({"params": params, "state": FlatMapping(state)} if state else params)
        )
    same(kind, tmp_path / "it.pystate")


def test_unknown_parameters_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{"resnet/conv/w": np.zeros((3, 3, 3, 8))})
    with pytest.raises(
        ValueError,
        match=r"must hold a published Perceiver IO; it lacks perceiver_encoder.*, and has \['resnet/conv/w'\]",
    ):
        load_haiku(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match="there is none at"):
        load_haiku(tmp_path / "nowhere.npz")


FOURIER = "PerceiverForImageClassificationFourier"
LATENTS = "perceiver_encoder/~/trainable_position_encoding/pos_embs"
WIDEN = "perceiver_encoder/~/self_attention/mlp/linear/w"
OWN = {"num_blocks": 2, "num_self_attention_heads": 4}


def parameters(kind: str = FOURIER) -> dict[str, Any]:
    found = Haiku(kind, original(kind)[1]).found
    return {f"{scope}/{name}": array for scope, parameters in found.items() for name, array in parameters.items()}


@pytest.mark.parametrize("name", ["OK.NPZ", "it", "it.pystate"])
def test_an_npz_is_known_by_what_it_holds(name: str, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "it.npz", **parameters())
    (tmp_path / "it.npz").rename(tmp_path / name)
    same(FOURIER, tmp_path / name)


def test_a_pickle_is_known_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "it.npz").write_bytes(pickle.dumps(Haiku(FOURIER, original(FOURIER)[1]).found))
    same(FOURIER, tmp_path / "it.npz")
    (tmp_path / "it.npz").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"it.npz must hold a dictionary of parameters by scope: it is of type list"):
        load_haiku(tmp_path / "it.npz")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_all_protocols(protocol: int, tmp_path: Path) -> None:
    found = Haiku(FOURIER, original(FOURIER)[1]).found
    (tmp_path / "it").write_bytes(pickle.dumps({"params": found, "state": {}}, protocol))
    same(FOURIER, tmp_path / "it")


@pytest.mark.parametrize("write", ["npz", "pickle"])
def test_bytes_in_the_other_order_are_turned_about(write: str, tmp_path: Path) -> None:
    turned = {name: array.astype(">f4") for name, array in parameters().items()}
    if write == "npz":
        np.savez(tmp_path / "it", **turned)
        (tmp_path / "it.npz").rename(tmp_path / "it")
    else:
        (tmp_path / "it").write_bytes(pickle.dumps({n.rpartition("/")[0]: {} for n in turned} | nested(turned)))
    same(FOURIER, tmp_path / "it")


def nested(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, array in flat.items():
        scope, _, parameter = name.rpartition("/")
        found.setdefault(scope, {})[parameter] = array
    return found


CONVOLUTIONAL = "PerceiverForImageClassificationConvProcessing"
INPUT_NORM = "perceiver_encoder/~/cross_attention/layer_norm_1/scale"
OTHER_SIZES: list[dict[str, Any]] = [
    {"num_bands": 6},
    {"num_bands": 1},
    {"num_bands": 2, "max_resolution": [5, 7]},
    {"max_resolution": [96, 128]},
]


@pytest.mark.parametrize("sizes", OTHER_SIZES)
@pytest.mark.parametrize("kind", [FOURIER, CONVOLUTIONAL])
def test_fourier_classifiers_of_other_sizes(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Shapes tell the number of bands, an argument tells the grid that they resolve."""
    model, tensors, _ = original(kind, **sizes)
    (tmp_path / "it").write_bytes(pickle.dumps(Haiku(kind, tensors).found))
    same(kind, tmp_path / "it", **sizes)
    resolution = {name: size for name, size in sizes.items() if name == "max_resolution"}
    again = load_haiku(tmp_path / "it", **OWN, **resolution)
    features = again.adapter.positions
    assert (features.num_bands, list(features.max_resolution)) == (
        sizes.get("num_bands", 64),
        sizes.get("max_resolution", [224, 224] if kind == FOURIER else [56, 56]),
    )
    images = torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(images), model(images), rtol=0.0, atol=0.0)
    if resolution:  # which is not in the weights, and changes the outputs
        assert not torch.allclose(load_haiku(tmp_path / "it", **OWN)(images), model(images), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(load_haiku(tmp_path / "it", **OWN, **sizes)(images), model(images), rtol=0.0, atol=0.0)


REFUSED_SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "other bands than the weights": (FOURIER, {}, {"num_bands": 8}, "num_bands must be 64, which the weights have"),
    "a width of no bands": (
        FOURIER,
        {INPUT_NORM: np.ones(263, np.float32)},
        {},
        rf"{INPUT_NORM} must have 3 \+ 2 x \(2 x num_bands \+ 1\) values; got 263",
    ),
    "too narrow": (FOURIER, {INPUT_NORM: np.ones(5, np.float32)}, {}, "values; got 5"),
    "a resolution of one size": (FOURIER, {}, {"max_resolution": 224}, "max_resolution as 2 whole numbers"),
    "a resolution of text": (
        "PerceiverForMaskedLM",
        {},
        {"max_resolution": [5, 7]},
        "max_resolution'] must be left out",
    ),
    "bands of flow": ("PerceiverForOpticalFlow", {}, {"num_bands": 64}, "num_bands'] must be left out"),
}


@pytest.mark.parametrize("case", REFUSED_SIZES)
def test_refused_sizes_of_fourier_features(case: str, tmp_path: Path) -> None:
    kind, changes, sizes, message = REFUSED_SIZES[case]
    np.savez(tmp_path / "it.npz", **(parameters(kind) | changes))
    with pytest.raises(ValueError, match=rf"it\.npz.*{message}"):
        load_haiku(tmp_path / "it.npz", **OWN, **sizes)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "whole numbers": (
        {LATENTS: np.zeros((5, 16), np.int32)},
        "pos_embs must be of a floating point dtype, one of .*; got torch.int32",
    ),
    "complex numbers": ({LATENTS: np.zeros((5, 16), np.complex64)}, "a floating point dtype, .*; got torch.complex64"),
    "mixed": (
        {LATENTS: np.zeros((5, 16), np.float64)},
        r"must be of the dtype of the other weights, torch.float(32|64) \(.*\); got torch.float(32|64)",
    ),
    "no latents": (
        {LATENTS: np.zeros((5, 0), np.float32)},
        r"pos_embs must have 2 axes at least and not be empty; its shape is \(5, 0\)",
    ),
    "latents of one axis": (
        {LATENTS: np.zeros(5, np.float32)},
        r"pos_embs must have 2 axes at least .*; its shape is \(5,\)",
    ),
    "a matrix without axes": (
        {WIDEN: np.zeros((), np.float32)},
        r"mlp/linear/w must have 2 axes at least .*; its shape is \(\)",
    ),
    "a wider layer": (
        {WIDEN: np.zeros((16, 32), np.float32)},
        r"self_attention_1/mlp/linear/w has shape \(16, 16\) torch.float32, not \(16, 32\)",
    ),
    "two names for one": (
        {LATENTS.replace("perceiver_", ""): np.zeros((5, 16), np.float32)},
        r"unknown \['encoder/~/trainable_position_encoding/pos_embs'\]",
    ),
    "a block more": (
        {WIDEN.replace("attention", "attention_7"): np.zeros((16, 16), np.float32)},
        r"unknown \['perceiver_encoder/~/self_attention_7/mlp/linear/w'\]",
    ),
}


@pytest.mark.parametrize("write", ["npz", "pickle"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_before_anything_is_read(
    case: str, write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = WRONG[case]
    if write == "npz":
        np.savez(tmp_path / "it.npz", **(parameters() | changes))
    else:
        (tmp_path / "it.npz").write_bytes(pickle.dumps(nested(parameters() | changes)))
    monkeypatch.setattr(torch, "from_numpy", lambda _: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=rf"it.npz.*{message}"):
        load_haiku(tmp_path / "it.npz", **OWN)


@pytest.mark.parametrize(
    "holds, message",
    [
        ({"params": [1]}, "by scope: params is of type list"),
        ({"params": None}, "by scope: params is of type NoneType"),
        ({"params": {}, "state": None}, "by scope: state is of type NoneType"),
        ({"params": {"embed": [1]}}, "by scope: embed is of type list"),
        ({"embed": {"embeddings": "text"}}, "embed/embeddings is not an array with data but of type str"),
        ({"embed": {"embeddings": {"w": 1}}}, "embed/embeddings is not an array with data but of type dict"),
        ({"a/b": {"c": np.ones(1)}, "a": {"b/c": np.ones(1)}}, "must hold a/b/c once"),
        ({"a" * 600: {"b" * 600: np.ones(1)}}, "under a name of 1000 letters at most, and"),
        (3, "by scope: it is of type int"),
    ],
)
def test_pickles_of_something_else_are_refused(holds: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(pickle.dumps(holds))
    with pytest.raises(ValueError, match=message):
        load_haiku(tmp_path / "it")


def test_misspelled_names_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "it.npz", **parameters())
    with pytest.raises(
        TypeError, match=r"no \['num_self_attention_headz'\]; it has \['_label.*'num_self_attention_heads'"
    ):
        load_haiku(tmp_path / "it.npz", num_self_attention_headz=4)
    load_haiku(
        tmp_path / "it.npz",
        model_type="perceiver",
        layer_norm_eps=1e-12,
        id2label={"0": "cat", "1": "dog", "2": "owl"},
        **OWN,
    )
