"""Functions that build the seven published Perceiver IO models from transformers configurations.

The implementation in transformers differs in four details from DeepMind's JAX code, with which the weights were
trained. `Numerics` selects between the two. In the code, `c` is the configuration and `n` the numerics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from perceiver_core import adapters, heads, positions, queries
from perceiver_core.blocks import MLP, CrossAttend, LatentTransformer, MultiHeadAttention, SelfAttend
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.interop import transformers_config as configs
from perceiver_core.interop.transformers_config import Config
from perceiver_core.models import PerceiverIO


class Numerics(NamedTuple):
    """Options for the four details in which transformers differs from DeepMind's code.

    The published weights were trained with DeepMind's code. `interop.TRANSFORMERS_NUMERICS` reproduces the outputs of
    transformers. `interop.DEEPMIND_NUMERICS` reproduces the outputs of DeepMind's code.

    Args:
        activation: Activation of all MLPs if `hidden_act` is "gelu" in the configuration. DeepMind's code uses the tanh
            approximation of GELU. transformers uses the exact GELU.
        stem: Factory of the stem in the convolutional image classifier. DeepMind's code pads before the convolution and
            before the pooling. transformers pads only before the convolution.
        query_residual: Whether the decoder of the image classifier with learned positions adds the query to the output
            of the cross-attention. True for transformers and False for DeepMind's code.
        transposed_stem: Whether to swap height and width of the kernel in the convolutional stem when weights are
            loaded from transformers. True undoes a swap that was made when the published weights were converted to
            transformers.

    Example:
        >>> pc.interop.DEEPMIND_NUMERICS.activation
        GELU(approximate='tanh')
        >>> relu = pc.interop.TRANSFORMERS_NUMERICS._replace(activation=nn.ReLU())
    """

    activation: nn.Module
    stem: Callable[..., nn.Module]
    query_residual: bool
    transposed_stem: bool


TRANSFORMERS_NUMERICS = Numerics(nn.GELU(), adapters.SymmetricPadConvStem, query_residual=True, transposed_stem=False)
DEEPMIND_NUMERICS = Numerics(nn.GELU("tanh"), adapters.ConvStem, query_residual=False, transposed_stem=True)


def build(config: Config, numerics: Numerics = TRANSFORMERS_NUMERICS) -> PerceiverIO:
    """Build the model that a transformers configuration describes, with randomly initialized weights.

    Raises:
        ValueError: If the configuration is not valid.
    """
    architecture, completed = configs.architecture_of(config), configs.complete(config)
    try:
        return MODELS[architecture](completed, numerics)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"config makes no {architecture}: {error}") from error


def masked_lm(c: Config, n: Numerics) -> PerceiverIO:
    """Build the byte-level masked language model, with logits over the vocabulary at every position."""
    text = _text(c)
    encoder = _encoder(text.dim, c, n)
    queried = queries.Learned(c["max_position_embeddings"], text.dim)
    decoder = _decoder(encoder, text.dim, None, c, n, attention={"qk_dim": 256, "v_dim": text.dim}, heads=8)
    return PerceiverIO(text, encoder, queried, decoder, heads.TiedLogits)


def sequence_classification(c: Config, n: Numerics) -> PerceiverIO:
    """Build the byte-level text classifier, with one logit per class."""
    return _classifier(_text(c), c, n)


def image_classification_learned(c: Config, n: Numerics) -> PerceiverIO:
    """Build the image classifier with linearly projected pixels and learned position encodings."""
    learned = positions.Projected(positions.LearnedGrid((c["image_size"],) * 2, 256), 256)
    image = adapters.Image(3, positions=learned, stem=partial(adapters.Project, dim=256))
    return _classifier(image, c, n, residual=n.query_residual)


def image_classification_fourier(c: Config, n: Numerics) -> PerceiverIO:
    """Build the image classifier with raw pixels and Fourier position encodings."""
    return _classifier(adapters.Image(3, positions=_fourier(c, published=224)), c, n)


def image_classification_convolutional(c: Config, n: Numerics) -> PerceiverIO:
    """Build the image classifier with a convolutional stem and Fourier position encodings."""
    return _classifier(adapters.Image(3, positions=_fourier(c, published=56), stem=partial(n.stem, dim=64)), c, n)


def optical_flow(c: Config, n: Numerics) -> PerceiverIO:
    """Build the optical flow model.

    The output `b 2 h w` is the (x, y) displacement of each pixel from frame 1 to frame 2, in units of 20 pixels.
    """
    size = tuple(c["train_size"])
    pair = adapters.FramePair(positions=positions.Fourier(2, 64, max_resolution=size))
    encoder = _encoder(pair.dim, c, n)
    decoder = _decoder(encoder, pair.dim, 2, c, n)
    return PerceiverIO(pair, encoder, queries.FromInputs(pair.dim), decoder, heads.Grid(size, scale=0.01))


def multimodal_autoencoding(c: Config, n: Numerics) -> PerceiverIO:
    """Build the autoencoder for video, audio and class labels. In the input, the label is always masked."""
    patch, frames, side = c["samples_per_patch"], c["num_frames"], c["image_size"]
    samples, dim = frames * c["audio_samples_per_frame"], c["output_num_channels"]
    audio = positions.Fourier(1, 192, max_resolution=samples)
    video = positions.Fourier(3, 32, max_resolution=(frames, side, side))
    inputs = adapters.Multimodal(
        {
            "audio": adapters.Audio(patch, positions=audio),
            "image": adapters.Video(positions=video, patch_size=(1, 4, 4)),
            "label": adapters.OneHotLabel(c["num_labels"]),
        },
        min_modality_channels=4,
        token_mask_rate={"audio": 0.0, "image": 0.0, "label": 1.0},
    )
    queried = queries.Multimodal(
        {
            "audio": queries.Grid((samples // patch,), audio, endpoint=False),
            "image": queries.Grid(c["output_shape"][1:], video, endpoint=False),
            "label": queries.Learned(1, c["_label_trainable_num_channels"]),
        },
        min_modality_channels=2,
    )
    outputs = {
        "audio": heads.Waveform(dim, patch),
        "image": heads.Linear(dim, 3),
        "label": heads.SingleQuery(heads.Linear(dim, c["num_labels"])),
    }
    encoder = _encoder(inputs.dim, c, n)
    decoder = _decoder(encoder, queried.dim, dim, c, n)
    return PerceiverIO(inputs, encoder, queried, decoder, heads.Multimodal(outputs))


MODELS = {
    configs.TEXT: masked_lm,
    configs.SEQUENCE: sequence_classification,
    configs.LEARNED: image_classification_learned,
    configs.PIXELS: image_classification_fourier,
    configs.CONVOLUTIONAL: image_classification_convolutional,
    configs.FLOW: optical_flow,
    configs.MULTIMODAL: multimodal_autoencoding,
}


def _text(c: Config) -> adapters.TokenEmbedding:
    learned = positions.LearnedEmbedding(c["max_position_embeddings"], c["d_model"])
    return adapters.TokenEmbedding(c["vocab_size"], c["d_model"], positions=learned, positions_include_padding=True)


def _fourier(c: Config, *, published: int) -> positions.Fourier:
    resolution = c["max_resolution"] or [published] * 2
    # One number instead of two equal ones, so that equal models have equal configs.
    resolution = published if list(resolution) == [published] * 2 else resolution
    return positions.Fourier(2, c["num_bands"], max_resolution=resolution)


def _classifier(
    adapter: adapters.TokenEmbedding | adapters.Image, c: Config, n: Numerics, *, residual: bool = True
) -> PerceiverIO:
    """Build a classifier with one learned output query. If `num_labels` is 0, the decoder has no linear layer."""
    encoder = _encoder(adapter.dim, c, n)
    decoder = _decoder(encoder, encoder.dim, c["num_labels"] or None, c, n, residual=residual)
    return PerceiverIO(adapter, encoder, queries.Learned(1, encoder.dim), decoder, heads.SingleQuery())


def _encoder(input_dim: int, c: Config, n: Numerics) -> Encoder:
    dropout, v = c["attention_probs_dropout_prob"], c["v_channels"]
    by_shape = {"q": c["d_latents"], "kv": input_dim}[c["cross_attention_shape_for_attention"]]
    qk = by_shape if c["qk_channels"] is None else c["qk_channels"]
    cross = partial(MultiHeadAttention, qk_dim=qk, v_dim=v, dropout=dropout)
    own = partial(MultiHeadAttention, qk_dim=c["qk_channels"], v_dim=v, out_dim=None, dropout=dropout)
    mlp = partial(MLP, activation=_activation(c, n))
    read = partial(
        CrossAttend,
        num_heads=c["num_cross_attention_heads"],
        attention=cross,
        mlp=partial(mlp, widening_factor=c["cross_attention_widening_factor"]),
        residual=c["use_query_residual"],
    )
    block = partial(SelfAttend, attention=own, mlp=partial(mlp, widening_factor=c["self_attention_widening_factor"]))
    return Encoder(
        input_dim,
        num_latents=c["num_latents"],
        dim=c["d_latents"],
        depth=c["num_self_attends_per_block"],
        num_heads=c["num_self_attention_heads"],
        cross_attention=read,
        latent_transformer=partial(LatentTransformer, num_repeats=c["num_blocks"], block=block),
    )


def _decoder(
    encoder: Encoder,
    query_dim: int,
    out: int | None,
    c: Config,
    n: Numerics,
    *,
    attention: Config | None = None,
    heads: int = 1,
    residual: bool = False,
) -> Decoder:
    by_shape: dict[str, Config] = {"kv": {}, "q": {"qk_dim": query_dim}}
    widths = by_shape[c["cross_attention_shape_for_attention"]] if attention is None else attention
    attend = partial(MultiHeadAttention, dropout=c["attention_probs_dropout_prob"], **widths)
    mlp = partial(MLP, activation=_activation(c, n))
    read = partial(CrossAttend, attention=attend, mlp=mlp, residual=residual)
    return Decoder(encoder.dim, query_dim=query_dim, out_dim=out, num_heads=heads, cross_attention=read)


def _activation(c: Config, n: Numerics) -> nn.Module:
    return n.activation if c["hidden_act"] == "gelu" else configs.ACTIVATIONS[c["hidden_act"]]
