"""What Haiku calls the parameters of DeepMind's Perceiver IO, and how it lays them out."""

from __future__ import annotations

import re

from torch import Tensor

# Scopes and parameters as Haiku names them, and what transformers calls them. The first that fits is taken.
SCOPES = [
    (r"^embed/embeddings$", "input_preprocessor.embeddings.weight"),
    (r"^trainable_position_encoding/pos_embs$", "input_preprocessor.position_embeddings.weight"),
    (r"^image_preprocessor/~/conv2_d/", "input_preprocessor.convnet_1x1."),
    (
        r"^image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs$",
        "input_preprocessor.position_embeddings.position_embeddings",
    ),
    (
        r"^image_preprocessor/~_build_network_inputs/position_encoding_projector/linear/",
        "input_preprocessor.positions_projection.",
    ),
    (r"^image_preprocessor/~/conv2_d_downsample/~/conv/", "input_preprocessor.convnet.conv."),
    (
        r"^image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/mean_ema/average$",
        "input_preprocessor.convnet.batchnorm.running_mean",
    ),
    (
        r"^image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/var_ema/average$",
        "input_preprocessor.convnet.batchnorm.running_var",
    ),
    (r"^image_preprocessor/~/conv2_d_downsample/~/batchnorm/", "input_preprocessor.convnet.batchnorm."),
    (r"^image_preprocessor/patches_linear/", "input_preprocessor.conv_after_patches."),
    (r"^multimodal_preprocessor/(\w+)_mask_token/pos_embs$", r"input_preprocessor.mask.\1"),
    (r"^multimodal_preprocessor/(\w+)_padding/pos_embs$", r"input_preprocessor.padding.\1"),
    (r"^multimodal_decoder/~decoder_query/(\w+)_padding/pos_embs$", r"decoder.padding.\1"),
    (r"^(?:multimodal|flow|classification)_decoder/~/basic_decoder/output/", "decoder.decoder.final_layer."),
    (
        r"^(?:multimodal|flow|classification)_decoder/~/basic_decoder/cross_attention/",
        "decoder.decoder.decoding_cross_attention/",
    ),
    (
        r"^classification_decoder/~/basic_decoder/~/trainable_position_encoding/pos_embs$",
        "decoder.decoder.output_position_encodings.position_embeddings",
    ),
    (
        r"^basic_decoder/~/trainable_position_encoding/pos_embs$",
        "decoder.output_position_encodings.position_embeddings",
    ),
    (r"^basic_decoder/cross_attention/", "decoder.decoding_cross_attention/"),
    (r"^embedding_decoder/bias$", "embedding_decoder.bias"),
    (r"^projection_postprocessor/linear/", "output_postprocessor.modalities.image.classifier."),
    (r"^classification_postprocessor/linear/", "output_postprocessor.modalities.label.classifier."),
    (r"^audio_postprocessor/linear/", "output_postprocessor.modalities.audio.classifier."),
    (r"^(?:perceiver_)?encoder/~/trainable_position_encoding/pos_embs$", "embeddings.latents"),
    (r"^(?:perceiver_)?encoder/~/cross_attention/", "encoder.cross_attention/"),
    (r"^(?:perceiver_)?encoder/~/self_attention/", "encoder.self_attends.0/"),
    (r"^(?:perceiver_)?encoder/~/self_attention_(\d+)/", r"encoder.self_attends.\1/"),
]
LAYERS = {
    "attention/linear": "attention.self.query",
    "attention/linear_1": "attention.self.key",
    "attention/linear_2": "attention.self.value",
    "attention/linear_3": "attention.output.dense",
    "mlp/linear": "mlp.dense1",
    "mlp/linear_1": "mlp.dense2",
}
CROSS = {"layer_norm": "attention.self.layernorm1", "layer_norm_1": "attention.self.layernorm2"}
CROSS |= {"layer_norm_2": "layernorm"}
SELF = {"layer_norm": "attention.self.layernorm1", "layer_norm_1": "layernorm"}
PARTS = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias"}
STATE = re.compile(r"/~/(mean|var)_ema/(hidden|counter)$")  # of a running mean while it is computed


def place_of(name: str) -> str:
    """What transformers calls a parameter.

    Args:
        name: `scope/parameter`.

    Raises:
        ValueError: a name that no published model has.

    Example:
        >>> from perceiver_core.checkpoints.haiku_names import place_of
        >>> place_of("perceiver_encoder/~/self_attention_3/mlp/linear/w")
        'perceiver.encoder.self_attends.3.mlp.dense1.weight'
    """
    for pattern, place in SCOPES:
        new, count = re.subn(pattern, place, name)
        if not count:
            continue
        if "attention/" in new or "self_attends" in new:
            new = _of_layer(new)
        head, _, part = new.rpartition(".")
        full = f"{head}.{PARTS.get(part, part)}"
        if name.startswith("classification_decoder") and full.endswith("position_embeddings"):
            return f"perceiver.{full}"
        return full if full.startswith("embedding_decoder") else f"perceiver.{full}"
    raise ValueError(f"{name} is no parameter of a published Perceiver IO")


def _of_layer(name: str) -> str:
    """`block/scope/parameter` of an attention layer."""
    block, _, rest = name.partition("/")
    scope, _, part = rest.rpartition("/")
    known = LAYERS | (SELF if "self_attends" in block else CROSS)
    if scope not in known:
        raise ValueError(f"{name} is no parameter of a published Perceiver IO")
    return f"{block}.{known[scope]}.{part}"


def laid_out(place: str, tensor: Tensor) -> Tensor:
    """Matrices `in out` and kernels `h w in out` as PyTorch has them; statistics without axes of one."""
    if ".batchnorm." in place:
        return tensor.flatten()
    if not place.endswith("weight") or "embeddings" in place:
        return tensor
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.mT if tensor.ndim == 2 else tensor
