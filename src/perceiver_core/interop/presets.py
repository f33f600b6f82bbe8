"""Presets: functions that build the published Perceiver IO models, with random weights and without dropout.

`create` builds the same models by name. With `num_classes=0`, a classifier returns features instead of logits: the
output of the decoder before its last linear layer.

Example:
    >>> from perceiver_core.interop import presets
    >>> with torch.device("meta"):
    ...     models = [presets.language(), presets.imagenet(), presets.flow()]
    >>> [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    [201108230, 48440627, 41057134]
"""

from __future__ import annotations

from perceiver_core.interop import published_models
from perceiver_core.interop import transformers_config as configs
from perceiver_core.interop.published_models import DEEPMIND_NUMERICS
from perceiver_core.models import PerceiverIO
from perceiver_core.registry import Json

_IMAGE = {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6}
_TEXT = {"d_model": 768, "num_latents": 256, "qk_channels": 256}


def language(vocab_size: int = 262, max_length: int = 2048) -> PerceiverIO:
    """Return the byte-level masked language model (201 million parameters): 256 latents of width 1280, 26 blocks.

    Reference: Jaegle et al. 2022 (Perceiver IO), table 1 ("Perceiver IO", UTF-8 bytes) and table 11.
    """
    return _language(vocab_size, max_length, d_latents=1280, depth=26)


def language_base(vocab_size: int = 32_000, max_length: int = 512) -> PerceiverIO:
    """Return the masked language model for SentencePiece tokens (223 million parameters).

    Reference: Jaegle et al. 2022 (Perceiver IO), table 1 ("Perceiver IO Base").
    """
    return _language(vocab_size, max_length, d_latents=1280, depth=26)


def language_large(vocab_size: int = 262, max_length: int = 2048) -> PerceiverIO:
    """Return the large byte-level masked language model (425 million parameters): width 1536, 40 blocks.

    Reference: Jaegle et al. 2022 (Perceiver IO), table 1 ("Perceiver IO++") and table 11.
    """
    return _language(vocab_size, max_length, d_latents=1536, depth=40)


def text(num_classes: int = 2, vocab_size: int = 262, max_length: int = 2048) -> PerceiverIO:
    """Return the text classifier with the encoder of `language`.

    Reference: transformers, `PerceiverForSequenceClassification` (deepmind/language-perceiver).
    """
    sizes = {**_TEXT, "d_latents": 1280, "v_channels": 1280, "num_self_attends_per_block": 26}
    sizes |= {"vocab_size": vocab_size, "max_position_embeddings": max_length}
    return _build(configs.SEQUENCE, sizes, num_classes)


def imagenet(num_classes: int = 1000) -> PerceiverIO:
    """Return the ImageNet classifier with 2D Fourier features (48.4 million parameters).

    Reference: Jaegle et al. 2022 (Perceiver IO), appendix A; deepmind/vision-perceiver-fourier.
    """
    return _build(configs.PIXELS, {**_IMAGE, "num_cross_attention_heads": 1}, num_classes)


def imagenet_learned(num_classes: int = 1000) -> PerceiverIO:
    """Return the ImageNet classifier with learned positions (62.3 million parameters).

    Reference: Jaegle et al. 2022 (Perceiver IO), appendix A; deepmind/vision-perceiver-learned.
    """
    return _build(configs.LEARNED, {**_IMAGE, "num_cross_attention_heads": 1, "image_size": 224}, num_classes)


def imagenet_conv(num_classes: int = 1000) -> PerceiverIO:
    """Return the ImageNet classifier with a convolution and pooling before the encoder (48.6 million parameters).

    Reference: Jaegle et al. 2022 (Perceiver IO), appendix A; deepmind/vision-perceiver-conv.
    """
    return _build(configs.CONVOLUTIONAL, {**_IMAGE, "num_cross_attention_heads": 1}, num_classes)


def flow() -> PerceiverIO:
    """Return the optical flow model for frames of 368 x 496 pixels (41 million parameters): 2048 latents, 24 blocks.

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 and table 16; deepmind/optical-flow-perceiver.
    """
    sizes = {"num_latents": 2048, "d_latents": 512, "num_self_attends_per_block": 24}
    return _build(configs.FLOW, {**sizes, "num_self_attention_heads": 16, "num_cross_attention_heads": 1})


def multimodal(num_classes: int = 700) -> PerceiverIO:
    """Return the autoencoder for video, audio and labels of Kinetics-700: 784 latents of width 512, 8 blocks.

    The label is also an input, so `num_classes` also changes the width of the input tokens.

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind/multimodal-perceiver.
    """
    sizes = {"num_latents": 28 * 28, "d_latents": 512, "num_self_attends_per_block": 8, "num_cross_attention_heads": 1}
    return _build(configs.MULTIMODAL, {**sizes, "num_labels": num_classes})


def _language(vocab_size: int, max_length: int, *, d_latents: int, depth: int) -> PerceiverIO:
    sizes = {**_TEXT, "d_latents": d_latents, "v_channels": d_latents, "num_self_attends_per_block": depth}
    return _build(configs.TEXT, {**sizes, "vocab_size": vocab_size, "max_position_embeddings": max_length})


def _build(architecture: str, sizes: dict[str, int], num_classes: int | None = None) -> PerceiverIO:
    """Build a published model without dropout. `num_classes=0` omits the last linear layer."""
    config: dict[str, Json] = {**sizes, "architectures": [architecture], "attention_probs_dropout_prob": 0.0}
    if num_classes:
        config["num_labels"] = num_classes
    completed = configs.complete(config)
    if num_classes == 0:
        completed["num_labels"] = 0
    return published_models.MODELS[architecture](completed, DEEPMIND_NUMERICS)
