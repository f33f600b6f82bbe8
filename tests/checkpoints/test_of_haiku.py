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
from torch import Tensor, nn

from perceiver_core.checkpoints import deepmind, published
from perceiver_core.checkpoints.of_transformers import build, fill, names

SMALL = {
    "num_latents": 5,
    "d_latents": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
KINDS: dict[str, dict[str, Any]] = {
    "PerceiverForMaskedLM": {
        "vocab_size": 11, "max_position_embeddings": 9, "d_model": 16, "qk_channels": 8, "v_channels": 16,
    },
    "PerceiverForImageClassificationLearned": {"image_size": 5},
    "PerceiverForImageClassificationFourier": {},
    "PerceiverForImageClassificationConvProcessing": {},
    "PerceiverForOpticalFlow": {"train_size": [5, 7]},
    "PerceiverForMultimodalAutoencoding": {
        "image_size": 8, "num_frames": 2, "audio_samples_per_frame": 16, "samples_per_patch": 8,
        "output_shape": [1, 2, 8, 8], "output_num_channels": 12, "_label_trainable_num_channels": 1024,
    },
}  # fmt: skip
DECODERS = {
    "PerceiverForMaskedLM": "basic_decoder",
    "PerceiverForOpticalFlow": "flow_decoder/~/basic_decoder",
    "PerceiverForMultimodalAutoencoding": "multimodal_decoder/~/basic_decoder",
}


class Haiku:
    """Parameters written as Haiku would, from tensors under transformers' names."""

    def __init__(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.found = {k.removeprefix("perceiver."): v.numpy() for k, v in tensors.items()}, {}
        encoder = "encoder/~" if "Multimodal" in kind else "perceiver_encoder/~"
        self.array(f"{encoder}/trainable_position_encoding", "pos_embs", "embeddings.latents")
        self.layer(f"{encoder}/cross_attention", "encoder.cross_attention", cross=True)
        for i in range(2):
            self.layer(f"{encoder}/self_attention{f'_{i}' * bool(i)}", f"encoder.self_attends.{i}")
        decoder = DECODERS.get(kind, "classification_decoder/~/basic_decoder")
        theirs = "decoder" if "MaskedLM" in kind else "decoder.decoder"
        self.layer(f"{decoder}/cross_attention", f"{theirs}.decoding_cross_attention", cross=True)
        if "MaskedLM" not in kind:
            self.linear(f"{decoder}/output", f"{theirs}.final_layer")
        getattr(self, f"of_{kind.removeprefix('PerceiverFor')}")(decoder, theirs)
        assert not self.tensors, sorted(self.tensors)

    def array(self, scope: str, name: str, theirs: str, turn: Any = lambda x: x) -> None:
        self.found.setdefault(scope, {})[name] = turn(self.tensors.pop(theirs)).copy()

    def linear(self, scope: str, theirs: str) -> None:
        kernel = (lambda x: x.transpose(2, 3, 1, 0)) if self.tensors[f"{theirs}.weight"].ndim == 4 else (lambda x: x.T)
        self.array(scope, "w", f"{theirs}.weight", kernel)
        self.array(scope, "b", f"{theirs}.bias")

    def norm(self, scope: str, theirs: str) -> None:
        self.array(scope, "scale", f"{theirs}.weight")
        self.array(scope, "offset", f"{theirs}.bias")

    def layer(self, scope: str, theirs: str, *, cross: bool = False) -> None:
        for number, part in enumerate(("self.query", "self.key", "self.value", "output.dense")):
            self.linear(f"{scope}/attention/linear{f'_{number}' * bool(number)}", f"{theirs}.attention.{part}")
        self.linear(f"{scope}/mlp/linear", f"{theirs}.mlp.dense1")
        self.linear(f"{scope}/mlp/linear_1", f"{theirs}.mlp.dense2")
        norms = ["attention.self.layernorm1", *(["attention.self.layernorm2"] if cross else []), "layernorm"]
        for number, norm in enumerate(norms):
            self.norm(f"{scope}/layer_norm{f'_{number}' * bool(number)}", f"{theirs}.{norm}")

    def query(self, decoder: str, theirs: str) -> None:
        scope = f"{decoder}/~/trainable_position_encoding"
        self.array(scope, "pos_embs", f"{theirs}.output_position_encodings.position_embeddings")

    def of_MaskedLM(self, decoder: str, theirs: str) -> None:
        self.array("embed", "embeddings", "input_preprocessor.embeddings.weight")
        self.array("trainable_position_encoding", "pos_embs", "input_preprocessor.position_embeddings.weight")
        self.array("embedding_decoder", "bias", "embedding_decoder.bias")
        self.query(decoder, theirs)

    def of_ImageClassificationFourier(self, decoder: str, theirs: str) -> None:
        self.query(decoder, theirs)

    def of_ImageClassificationLearned(self, decoder: str, theirs: str) -> None:
        self.linear("image_preprocessor/~/conv2_d", "input_preprocessor.convnet_1x1")
        inputs = "image_preprocessor/~_build_network_inputs"
        place = "input_preprocessor.position_embeddings.position_embeddings"
        self.array(f"{inputs}/trainable_position_encoding", "pos_embs", place)
        self.linear(f"{inputs}/position_encoding_projector/linear", "input_preprocessor.positions_projection")
        self.query(decoder, theirs)

    def of_ImageClassificationConvProcessing(self, decoder: str, theirs: str) -> None:
        stem = "image_preprocessor/~/conv2_d_downsample/~"
        kernel = lambda x: x.transpose(2, 3, 1, 0)  # noqa: E731
        self.array(f"{stem}/conv", "w", "input_preprocessor.convnet.conv.weight", kernel)
        shaped = lambda x: x.reshape(1, 1, 1, -1)  # noqa: E731
        for name, part in (("scale", "weight"), ("offset", "bias")):
            self.array(f"{stem}/batchnorm", name, f"input_preprocessor.convnet.batchnorm.{part}", shaped)
        for name in ("mean", "var"):
            place = f"input_preprocessor.convnet.batchnorm.running_{name}"
            self.array(f"{stem}/batchnorm/~/{name}_ema", "average", place, shaped)
            self.found[f"{stem}/batchnorm/~/{name}_ema"] |= {"hidden": np.zeros(3), "counter": np.zeros(())}
        self.tensors.pop("input_preprocessor.convnet.batchnorm.num_batches_tracked")
        self.query(decoder, theirs)

    def of_OpticalFlow(self, decoder: str, theirs: str) -> None:
        self.linear("image_preprocessor/patches_linear", "input_preprocessor.conv_after_patches")

    def of_MultimodalAutoencoding(self, decoder: str, theirs: str) -> None:
        for kind in ("audio", "image", "label"):
            self.array(f"multimodal_preprocessor/{kind}_padding", "pos_embs", f"input_preprocessor.padding.{kind}")
            self.array(f"multimodal_preprocessor/{kind}_mask_token", "pos_embs", f"input_preprocessor.mask.{kind}")
            self.array(f"multimodal_decoder/~decoder_query/{kind}_padding", "pos_embs", f"decoder.padding.{kind}")
        for name, kind in (("audio", "audio"), ("projection", "image"), ("classification", "label")):
            self.linear(f"{name}_postprocessor/linear", f"output_postprocessor.modalities.{kind}.classifier")
        label = "decoder.modalities.label.decoder.output_position_encodings.position_embeddings"
        self.array("classification_decoder/~/basic_decoder/~/trainable_position_encoding", "pos_embs", label)


def original(kind: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A model with DeepMind's numerics, its tensors under transformers' names, its configuration."""
    config = SMALL | KINDS[kind] | {"architectures": [kind]}
    torch.manual_seed(0)
    model = build(config, published.DEEPMIND).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.4 + 0.1)
    state, tensors = model.state_dict(), {}
    for name, place in names(config).items():
        tensors[name] = state[place].clone()
        if name.endswith("position_embeddings.position_embeddings"):
            tensors[name] = tensors[name].flatten(0, -2)
        if ".padding." in name or ".mask." in name:
            tensors[name] = tensors[name][None]
    return model, tensors, config


TOLD = ("num_blocks", "num_self_attention_heads", "num_cross_attention_heads", "image_size", "train_size", "num_frames",
        "audio_samples_per_frame", "output_shape")  # fmt: skip


def same(kind: str, path: Path) -> None:
    model, _, config = original(kind)
    again = deepmind(path, **{name: config[name] for name in TOLD if name in config})
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
    with pytest.raises(ValueError, match="resnet/conv/w is no parameter of a published Perceiver IO"):
        deepmind(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match="there is none at"):
        deepmind(tmp_path / "nowhere.npz")


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
    with pytest.raises(ValueError, match=r"it.npz must hold a dictionary of parameters by scope; it is of type list"):
        deepmind(tmp_path / "it.npz")


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


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "whole numbers": (
        {LATENTS: np.zeros((5, 16), np.int32)},
        "pos_embs must be of floating point numbers; it is of int32",
    ),
    "complex numbers": ({LATENTS: np.zeros((5, 16), np.complex64)}, "floating point numbers; it is of complex64"),
    "mixed": (
        {LATENTS: np.zeros((5, 16), np.float64)},
        "must be of one dtype; .* is of float(32|64), .* of float(32|64)",
    ),
    "no latents": ({LATENTS: np.zeros((5, 0), np.float32)}, r"pos_embs must not be empty; its shape is \(5, 0\)"),
    "latents of one axis": ({LATENTS: np.zeros(5, np.float32)}, r"latents must have 2 axes; its shape is \(5,\)"),
    "a matrix without axes": ({WIDEN: np.zeros((), np.float32)}, r"dense1.weight must have 2 axes; its shape is \(\)"),
    "a wider layer": ({WIDEN: np.zeros((16, 32), np.float32)}, "must have shape"),
    "two names for one": (
        {LATENTS.replace("perceiver_", ""): np.zeros((5, 16), np.float32)},
        f"{LATENTS} and {LATENTS.replace('perceiver_', '')} are the same parameter",
    ),
    "a block more": (
        {WIDEN.replace("attention", "attention_7"): np.zeros((16, 16), np.float32)},
        r"lacks \[.*, and has \['perceiver.encoder.self_attends.7.mlp.dense1.weight'\]",
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
        deepmind(tmp_path / "it.npz", **OWN)


@pytest.mark.parametrize(
    "holds, message",
    [
        ({"params": [1]}, "by scope; params is of type list"),
        ({"params": None}, "by scope; params is of type NoneType"),
        ({"params": {}, "state": None}, "by scope; state is of type NoneType"),
        ({"params": {"embed": [1]}}, "by scope; embed is of type list"),
        ({"embed": {"embeddings": "text"}}, "must hold arrays; embed/embeddings is of type str"),
        ({"embed": {"embeddings": {"w": 1}}}, "must hold arrays; embed/embeddings is of type dict"),
        ({"a/b": {"c": np.ones(1)}, "a": {"b/c": np.ones(1)}}, "must hold a/b/c once"),
        ({"a" * 600: {"b" * 600: np.ones(1)}}, "under a name of 1000 letters at most"),
        (3, "by scope; it is of type int"),
    ],
)
def test_pickles_of_something_else_are_refused(holds: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(pickle.dumps(holds))
    with pytest.raises(ValueError, match=message):
        deepmind(tmp_path / "it")


def test_misspelled_names_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "it.npz", **parameters())
    with pytest.raises(
        TypeError, match=r"no \['num_self_attention_headz'\]; it has \['_label.*'num_self_attention_heads'"
    ):
        deepmind(tmp_path / "it.npz", num_self_attention_headz=4)
    deepmind(
        tmp_path / "it.npz",
        model_type="perceiver",
        layer_norm_eps=1e-12,
        id2label={"0": "cat", "1": "dog", "2": "owl"},
        **OWN,
    )


def test_wrong_weights_are_named() -> None:
    kind = "PerceiverForImageClassificationFourier"
    model, tensors, config = original(kind)
    del tensors["perceiver.embeddings.latents"]
    with pytest.raises(ValueError, match=r"missing \['perceiver.embeddings.latents'\], unknown \['more'\]"):
        fill(model, tensors | {"more": torch.zeros(1)}, config, published.DEEPMIND)
    _, tensors, _ = original(kind)
    tensors["perceiver.embeddings.latents"] = torch.zeros(5, 17)
    with pytest.raises(ValueError, match=r"latents must have shape \(5, 16\); got \(5, 17\)"):
        fill(model, tensors, config, published.DEEPMIND)
