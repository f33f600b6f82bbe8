"""The seven published Perceiver IO models, built from the configuration that transformers keeps beside their weights.

transformers and the JAX code that the weights were trained with differ in four places. Which of them is followed is a
choice of parts, `Numerics`: `TRANSFORMERS` gives what transformers gives; `DEEPMIND` what the weights were trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from perceiver_core import adapters, heads, positions, queries
from perceiver_core.blocks import MLP, CrossAttend, LatentTransformer, MultiHeadAttention, SelfAttend
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.models import PerceiverIO

Config: TypeAlias = Mapping[str, Any]


class Numerics(NamedTuple):
    """Where transformers and the code that the weights were trained with differ.

    Args:
        activation: of all MLPs, where the configuration has "gelu". DeepMind's is the approximation by tanh, that of
            transformers exact.
        stem: of the convolutional image classifier. DeepMind pads both of its strides, transformers the first.
        residual: whether the decoder of the image classifier with learned positions adds its query to what it read.
            DeepMind's does not.
        transposed: whether the kernel of that stem lies in the file with rows and columns changed about, as
            transformers' converter has left it in the published weights.
    """

    activation: nn.Module
    stem: Callable[..., nn.Module]
    residual: bool
    transposed: bool


TRANSFORMERS = Numerics(nn.GELU(), adapters.SymmetricPadConvStem, residual=True, transposed=False)
DEEPMIND = Numerics(nn.GELU("tanh"), adapters.ConvStem, residual=False, transposed=True)

# What a configuration names; "gelu" is a choice of numerics.
ACTIVATIONS = {
    "gelu_pytorch_tanh": nn.GELU("tanh"),
    "gelu_new": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
}


def masked_lm(c: Config, n: Numerics) -> PerceiverIO:
    """Bytes, some of them masked, to a logit for every byte at every place."""
    text = _text(c)
    encoder = _encoder(text.dim, c, n)
    ask = queries.Learned(c["max_position_embeddings"], text.dim)
    decoder = _decoder(encoder, ask, None, c, n, widths={"qk_dim": 256, "v_dim": text.dim}, heads=8)
    return PerceiverIO(text, encoder, ask, decoder, heads.TiedLogits)


def sequence_classification(c: Config, n: Numerics) -> PerceiverIO:
    """Bytes to a logit for each class."""
    return _classifier(_text(c), c, n)


def image_classification_learned(c: Config, n: Numerics) -> PerceiverIO:
    """Pictures to classes: pixels projected, learned positions."""
    where = positions.Projected(positions.LearnedGrid((c["image_size"],) * 2, 256), 256)
    image = adapters.Image(3, positions=where, stem=partial(adapters.Project, dim=256))
    return _classifier(image, c, n, residual=n.residual)


def image_classification_fourier(c: Config, n: Numerics) -> PerceiverIO:
    """Pictures to classes: pixels, Fourier features."""
    return _classifier(adapters.Image(3, positions=positions.Fourier(2, 64, max_resolution=224)), c, n)


def image_classification_convolutional(c: Config, n: Numerics) -> PerceiverIO:
    """Pictures to classes: a convolution, Fourier features."""
    where = positions.Fourier(2, 64, max_resolution=56)
    return _classifier(adapters.Image(3, positions=where, stem=partial(n.stem, dim=64)), c, n)


def optical_flow(c: Config, n: Numerics) -> PerceiverIO:
    """Two frames to the flow from the first to the second, `b 2 h w`: across and down, in pixels over 20."""
    size = tuple(c["train_size"])
    pair = adapters.FramePair(positions=positions.Fourier(2, 64, max_resolution=size))
    encoder = _encoder(pair.dim, c, n)
    ask = queries.FromInputs(pair.dim)
    return PerceiverIO(pair, encoder, ask, _decoder(encoder, ask, 2, c, n), heads.Grid(size, scale=0.01))


def multimodal_autoencoding(c: Config, n: Numerics) -> PerceiverIO:
    """Film, sound and label, the label never seen, to all three."""
    patch, frames, side = c["samples_per_patch"], c["num_frames"], c["image_size"]
    samples = frames * c["audio_samples_per_frame"]
    sound = positions.Fourier(1, 192, max_resolution=samples)
    film = positions.Fourier(3, 32, max_resolution=(frames, side, side))
    everything = adapters.Multimodal(
        {
            "audio": adapters.Audio(patch, positions=sound),
            "image": adapters.Video(positions=film, patch_size=(1, 4, 4)),
            "label": adapters.OneHotLabel(c["num_labels"]),
        },
        min_modality_channels=4,
        token_mask_rate={"audio": 0.0, "image": 0.0, "label": 1.0},
    )
    ask = queries.Multimodal(
        {
            "audio": queries.Grid((samples // patch,), sound, endpoint=False),
            "image": queries.Grid(c["output_shape"][1:], film, endpoint=False),
            "label": queries.Learned(1, c["_label_trainable_num_channels"]),
        },
        min_modality_channels=2,
    )
    encoder, dim = _encoder(everything.dim, c, n), c["output_num_channels"]
    answers = {
        "audio": heads.Waveform(dim, patch),
        "image": heads.Linear(dim, 3),
        "label": heads.SingleQuery(heads.Linear(dim, c["num_labels"])),
    }
    return PerceiverIO(everything, encoder, ask, _decoder(encoder, ask, dim, c, n), heads.Multimodal(answers))


MODELS: dict[str, Callable[[Config, Numerics], PerceiverIO]] = {
    "PerceiverForMaskedLM": masked_lm,
    "PerceiverForSequenceClassification": sequence_classification,
    "PerceiverForImageClassificationLearned": image_classification_learned,
    "PerceiverForImageClassificationFourier": image_classification_fourier,
    "PerceiverForImageClassificationConvProcessing": image_classification_convolutional,
    "PerceiverForOpticalFlow": optical_flow,
    "PerceiverForMultimodalAutoencoding": multimodal_autoencoding,
}


def _text(c: Config) -> adapters.TokenEmbedding:
    where = positions.LearnedEmbedding(c["max_position_embeddings"], c["d_model"])
    return adapters.TokenEmbedding(c["vocab_size"], c["d_model"], positions=where, positions_include_padding=True)


def _classifier(adapter: Any, c: Config, n: Numerics, *, residual: bool = True) -> PerceiverIO:
    """One learned query, one answer."""
    encoder = _encoder(adapter.dim, c, n)
    ask = queries.Learned(1, encoder.dim)
    decoder = _decoder(encoder, ask, c["num_labels"], c, n, residual=residual)
    return PerceiverIO(adapter, encoder, ask, decoder, heads.SingleQuery())


def _encoder(width: int, c: Config, n: Numerics) -> Encoder:
    dropout = c["attention_probs_dropout_prob"]
    qk, v = c["qk_channels"], c["v_channels"]
    reads = {"q": c["d_latents"], "kv": width}[c["cross_attention_shape_for_attention"]] if qk is None else qk
    cross = partial(MultiHeadAttention, qk_dim=reads, v_dim=v, dropout=dropout)
    own = partial(MultiHeadAttention, qk_dim=qk, v_dim=v, out_dim=None, dropout=dropout)
    widening = c["cross_attention_widening_factor"], c["self_attention_widening_factor"]
    mlps = [partial(MLP, widening_factor=factor, activation=_activation(c, n)) for factor in widening]
    read = partial(
        CrossAttend,
        num_heads=c["num_cross_attention_heads"],
        attention=cross,
        mlp=mlps[0],
        residual=c["use_query_residual"],
    )
    process = partial(LatentTransformer, num_repeats=c["num_blocks"], block=partial(SelfAttend, attention=own, mlp=mlps[1]))
    return Encoder(
        width,
        num_latents=c["num_latents"],
        dim=c["d_latents"],
        depth=c["num_self_attends_per_block"],
        num_heads=c["num_self_attention_heads"],
        cross_attention=read,
        latent_transformer=process,
    )


def _decoder(
    encoder: Encoder,
    ask: Any,
    out: int | None,
    c: Config,
    n: Numerics,
    *,
    widths: Mapping[str, int] | None = None,
    heads: int = 1,
    residual: bool = False,
) -> Decoder:
    by_shape = {"kv": {}, "q": {"qk_dim": ask.dim}}[c["cross_attention_shape_for_attention"]]
    widths = by_shape if widths is None else widths
    attend = partial(MultiHeadAttention, dropout=c["attention_probs_dropout_prob"], **widths)
    mlp = partial(MLP, activation=_activation(c, n))
    read = partial(CrossAttend, attention=attend, mlp=mlp, residual=residual)
    return Decoder(encoder.dim, query_dim=ask.dim, out_dim=out, num_heads=heads, cross_attention=read)


def _activation(c: Config, n: Numerics) -> nn.Module:
    return n.activation if c["hidden_act"] == "gelu" else ACTIVATIONS[c["hidden_act"]]
