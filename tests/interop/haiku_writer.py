"""Files as DeepMind's code writes them, written from small models of ours by way of transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perceiver_core.checkpoints.state import state_tensors
from perceiver_core.interop import DEEPMIND_NUMERICS
from perceiver_core.interop.published_models import build
from perceiver_core.interop.published_weights import from_transformers
from perceiver_core.models import PerceiverIO

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


def original(kind: str, **more: Any) -> tuple[PerceiverIO, dict[str, Tensor], dict[str, Any]]:
    """A model with DeepMind's numerics, its tensors under transformers' names, its configuration."""
    config = SMALL | KINDS[kind] | {"architectures": [kind]} | more
    torch.manual_seed(0)
    model = build(config, DEEPMIND_NUMERICS).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.4 + 0.1)
    tensors = from_transformers(config, transposed_stem=False).save(state_tensors(model))
    return model, {name: tensor.detach().clone() for name, tensor in tensors.items()}, config
