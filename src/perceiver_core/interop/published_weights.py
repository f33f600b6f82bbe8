"""Weight mappings of the published models from transformers and from Haiku to this library (`ours`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from perceiver_core.checkpoints.state import assign, state_tensors
from perceiver_core.interop import transformers_config as configs
from perceiver_core.interop.transformers_config import Config
from perceiver_core.interop.weight_files.weight_checks import check_finite
from perceiver_core.interop.weight_mapping import (
    TRANSPOSED,
    UNCHANGED,
    Entry,
    Transform,
    WeightMapping,
    rearranged,
)


class Part(NamedTuple):
    """One tensor of a module, such as its bias: its name suffixes, and the transforms to this library's layout."""

    suffix: str  # end of the tensor name in this library and in transformers
    haiku: str | None  # end of the tensor name in Haiku; None if Haiku does not store the tensor
    from_haiku: Transform = UNCHANGED
    from_transformers: Transform = UNCHANGED


# Name of a module or tensor in this library, in transformers and in Haiku, and the tensors of the module.
Row: TypeAlias = tuple[str, str, str, Sequence[Part]]

KERNEL = rearranged("height width input output -> output input height width")
FIRST_AXIS, CHANNELS = rearranged("1 dim -> dim"), rearranged("1 1 1 dim -> dim")
TENSOR, VECTOR = [Part("", "")], [Part("", "", FIRST_AXIS, FIRST_AXIS)]
LINEAR = [Part(".weight", "/w", TRANSPOSED), Part(".bias", "/b")]
CONVOLUTION = [Part(".weight", "/w", KERNEL), Part(".bias", "/b")]
NORM = [Part(".weight", "/scale"), Part(".bias", "/offset")]
BATCH_NORM = [
    Part(".weight", "/scale", CHANNELS),
    Part(".bias", "/offset", CHANNELS),
    Part(".running_mean", "/~/mean_ema/average", CHANNELS),
    Part(".running_var", "/~/var_ema/average", CHANNELS),
    Part(".num_batches_tracked", None, Transform(lambda _: torch.tensor(0), lambda _: ())),
]
ATTENTION: list[Row] = [
    ("attention.query", "attention.self.query", "attention/linear", LINEAR),
    ("attention.key", "attention.self.key", "attention/linear_1", LINEAR),
    ("attention.value", "attention.self.value", "attention/linear_2", LINEAR),
    ("attention.output", "attention.output.dense", "attention/linear_3", LINEAR),
    ("mlp.expand", "mlp.dense1", "mlp/linear", LINEAR),
    ("mlp.contract", "mlp.dense2", "mlp/linear_1", LINEAR),
]
SELF_ATTEND: list[Row] = [
    ("norm", "attention.self.layernorm1", "layer_norm", NORM),
    ("mlp_norm", "layernorm", "layer_norm_1", NORM),
    *ATTENTION,
]
CROSS_ATTEND: list[Row] = [
    ("query_norm", "attention.self.layernorm1", "layer_norm", NORM),
    ("input_norm", "attention.self.layernorm2", "layer_norm_1", NORM),
    ("mlp_norm", "layernorm", "layer_norm_2", NORM),
    *ATTENTION,
]
CLASSIFIER = "classification_decoder/~/basic_decoder"
HAIKU_DECODERS = dict.fromkeys(configs.ARCHITECTURES, CLASSIFIER) | {
    configs.TEXT: "basic_decoder",
    configs.FLOW: "flow_decoder/~/basic_decoder",
    configs.MULTIMODAL: "multimodal_decoder/~/basic_decoder",
}
QUERY, POSITIONS = "output_position_encodings.position_embeddings", "trainable_position_encoding/pos_embs"


def from_transformers(config: Config, *, transposed_stem: bool) -> WeightMapping:
    """Return the mapping from transformers weights to weights of this library. See `Numerics` for `transposed_stem`."""
    stem = TRANSPOSED if transposed_stem else UNCHANGED
    return WeightMapping(
        Entry(ours + part.suffix, transformers + part.suffix, part.from_transformers)
        for ours, transformers, _, parts in _rows(config, stem=stem)
        for part in parts
    )


def from_haiku(config: Config, names: Collection[str]) -> WeightMapping:
    """Return the mapping from Haiku parameters to weights of this library. `names` are all names in the Haiku file."""
    return WeightMapping(
        Entry(ours + part.suffix, () if part.haiku is None else haiku + part.haiku, part.from_haiku)
        for ours, _, haiku, parts in _rows(config, haiku_encoder=haiku_encoder(names))
        for part in parts
    )


def load_weights(
    model: nn.Module, mapping: WeightMapping, headers: Mapping[str, Tensor], read: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Load weights into a model on the meta device. Names, shapes and dtypes are checked before weights are read.

    Args:
        model: Model on the meta device. It is set to evaluation mode.
        mapping: Mapping from weights of the other project to weights of the model.
        headers: Dictionary of meta tensors with the shapes and dtypes of the other project's weights, keyed by name.
        read: Function that reads the other project's weights from the file.

    Raises:
        ValueError: If the headers do not match the model, or a weight is not finite.
    """
    mapping.check(headers, like=state_tensors(model))
    weights = read()
    check_finite(weights)
    assign(model, {name: tensor.contiguous() for name, tensor in mapping.load(weights).items()})
    model.eval()


def haiku_encoder(names: Collection[str]) -> str:
    """Return the prefix of the encoder's parameter names in Haiku: "perceiver_encoder/~" (default) or "encoder/~"."""
    scopes = ("perceiver_encoder/~", "encoder/~")
    return next((scope for scope in scopes if any(name.startswith(f"{scope}/") for name in names)), scopes[0])


def _rows(config: Config, *, haiku_encoder: str = "", stem: Transform = UNCHANGED) -> list[Row]:
    """Return the names of the model's modules in all three projects, one `Row` per module.

    `haiku_encoder` is the prefix of the encoder's names in Haiku. `stem` converts the kernel of the convolutional stem.
    """
    architecture, completed = configs.architecture_of(config), configs.complete(config)
    decoder, scope = "perceiver.decoder" + ".decoder" * (architecture != configs.TEXT), HAIKU_DECODERS[architecture]
    reads = f"{haiku_encoder}/cross_attention", f"{scope}/cross_attention"
    rows: list[Row] = [
        ("encoder.latents", "perceiver.embeddings.latents", f"{haiku_encoder}/{POSITIONS}", TENSOR),
        *_within("encoder.reads.0", "perceiver.encoder.cross_attention", reads[0], CROSS_ATTEND),
        *_within("decoder.cross_attention", f"{decoder}.decoding_cross_attention", reads[1], CROSS_ATTEND),
    ]
    for i in range(completed["num_self_attends_per_block"]):
        layer = f"{haiku_encoder}/self_attention{f'_{i}' if i else ''}"  # Haiku does not number the first module
        rows += _within(f"encoder.transformers.0.blocks.{i}", f"perceiver.encoder.self_attends.{i}", layer, SELF_ATTEND)
    if architecture != configs.TEXT:
        rows.append(("decoder.output", f"{decoder}.final_layer", f"{scope}/output", LINEAR))
    if architecture not in (configs.FLOW, configs.MULTIMODAL):
        rows.append(("queries.vectors", f"{decoder}.{QUERY}", f"{scope}/~/{POSITIONS}", TENSOR))
    return rows + _outer_rows(architecture, completed["image_size"], stem)


def _within(ours: str, transformers: str, haiku: str, rows: Sequence[Row]) -> list[Row]:
    return [(f"{ours}.{o}", f"{transformers}.{t}", f"{haiku}/{h}", parts) for o, t, h, parts in rows]


def _outer_rows(architecture: str, image_size: int, stem: Transform) -> list[Row]:
    """Return one `Row` for each architecture-specific module outside the encoder and decoder."""
    inputs, network = "perceiver.input_preprocessor", "image_preprocessor/~_build_network_inputs"
    learned, downsample = f"{inputs}.position_embeddings", "image_preprocessor/~/conv2_d_downsample/~"
    reshaped = rearranged("(height width) dim -> height width dim", height=image_size)
    grid, kernel = [Part("", "", reshaped, reshaped)], [Part("", "", KERNEL, stem)]
    projector = f"{network}/position_encoding_projector/linear"
    text: list[Row] = [
        ("adapter.vectors", f"{inputs}.embeddings.weight", "embed/embeddings", TENSOR),
        ("adapter.positions.vectors", f"{learned}.weight", POSITIONS, TENSOR),
    ]
    tables: dict[str, list[Row]] = {
        configs.TEXT: [*text, ("head.bias", "embedding_decoder.bias", "embedding_decoder/bias", TENSOR)],
        configs.SEQUENCE: text,
        configs.LEARNED: [
            ("adapter.stem.convolution", f"{inputs}.convnet_1x1", "image_preprocessor/~/conv2_d", CONVOLUTION),
            ("adapter.positions.project", f"{inputs}.positions_projection", projector, LINEAR),
            ("adapter.positions.positions.vectors", f"{learned}.position_embeddings", f"{network}/{POSITIONS}", grid),
        ],
        configs.CONVOLUTIONAL: [
            ("adapter.stem.convolution.weight", f"{inputs}.convnet.conv.weight", f"{downsample}/conv/w", kernel),
            ("adapter.stem.norm", f"{inputs}.convnet.batchnorm", f"{downsample}/batchnorm", BATCH_NORM),
        ],
        configs.FLOW: [
            ("adapter.project", f"{inputs}.conv_after_patches", "image_preprocessor/patches_linear", LINEAR)
        ],
        configs.MULTIMODAL: _multimodal_rows(inputs, "perceiver.output_postprocessor.modalities"),
    }
    return tables.get(architecture, [])


def _multimodal_rows(inputs: str, outputs: str) -> list[Row]:
    label, preprocessor = f"perceiver.decoder.modalities.label.decoder.{QUERY}", "multimodal_preprocessor"
    rows: list[Row] = [
        ("queries.sources.label.vectors", label, f"{CLASSIFIER}/~/{POSITIONS}", TENSOR),
        ("head.heads.audio.samples", f"{outputs}.audio.classifier", "audio_postprocessor/linear", LINEAR),
        ("head.heads.image.values", f"{outputs}.image.classifier", "projection_postprocessor/linear", LINEAR),
        ("head.heads.label.head.values", f"{outputs}.label.classifier", "classification_postprocessor/linear", LINEAR),
    ]
    for of in ("audio", "image", "label"):
        query = f"multimodal_decoder/~decoder_query/{of}_padding/pos_embs"
        rows += [
            (f"adapter.padding.{of}", f"{inputs}.padding.{of}", f"{preprocessor}/{of}_padding/pos_embs", VECTOR),
            (f"adapter.mask_tokens.{of}", f"{inputs}.mask.{of}", f"{preprocessor}/{of}_mask_token/pos_embs", VECTOR),
            (f"queries.padding.{of}", f"perceiver.decoder.padding.{of}", query, VECTOR),
        ]
    return rows
