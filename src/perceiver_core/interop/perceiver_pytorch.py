"""Loader of perceiver-pytorch (lucidrains) models from their weights and constructor arguments.

Most constructor arguments are inferred from the weights. `load_perceiver_pytorch` documents the others.
In the code, `theirs` is perceiver-pytorch and `ours` is this library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_core import checks, queries, sharing
from perceiver_core import heads as heads_
from perceiver_core.adapters import DropTokens, Grid
from perceiver_core.blocks import (
    GEGLU,
    MLP,
    AttentionResidual,
    CrossAttend,
    LatentTransformer,
    MultiHeadAttention,
    SelfAttend,
)
from perceiver_core.checkpoints.state import assign
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.error_messages import errors_with_path, printable_errors
from perceiver_core.interop.checked_arguments import CheckedArguments
from perceiver_core.interop.weight_files.state_dict_files import read_state_dict
from perceiver_core.interop.weight_files.weight_checks import check_finite, check_floats
from perceiver_core.interop.weight_mapping import Entry, WeightMapping, rearranged, renamed
from perceiver_core.kernels import inverted
from perceiver_core.models import Perceiver, PerceiverIO
from perceiver_core.positions import FourierPerAxis
from perceiver_core.registry import Json


class Layout(NamedTuple):
    """Names of the model class and its modules in one version of perceiver-pytorch. {0} and {1} stand for indices."""

    model: str  # name of the class
    read: str  # name of the cross-attention in layer {0}
    read_mlp: str  # name of the MLP after the cross-attention in layer {0}
    self_attend: str  # name of self-attention block {1} in layer {0}


LAYOUTS = (
    Layout("Perceiver", "layers.{0}.cross_attn", "layers.{0}.cross_ff", "layers.{0}.self_attns.{1}"),
    Layout("PerceiverIO", "cross_attend_block.cross_attn", "cross_attend_block.cross_ff", "layers.{0}.self_attns.{1}"),
    Layout("Perceiver", "layers.{0}.0", "layers.{0}.1", "layers.{0}.2.{1}"),  # versions 0.8 to 0.10, like the next
    Layout("PerceiverIO", "cross_attend_blocks.0", "cross_attend_blocks.1", "layers.{0}"),
)
COMMON = {
    "depth", "num_latents", "latent_dim", "cross_heads", "latent_heads", "cross_dim_head", "latent_dim_head",
    "weight_tie_layers", "attn_residual", "attn_residual_rank", "inverted_cross_attn",
}  # fmt: skip
ARGUMENTS = {
    "Perceiver": COMMON | {
        "num_freq_bands", "max_freq", "input_channels", "input_axis", "num_classes", "attn_dropout", "ff_dropout",
        "fourier_encode_data", "self_per_cross_attn", "final_classifier_head",
    },
    "PerceiverIO": COMMON | {"dim", "queries_dim", "logits_dim", "decoder_ff", "seq_dropout_prob"},
}  # fmt: skip
ATTENTION = [
    Entry("attention.query.weight", "fn.to_q.weight"),
    Entry(
        ("attention.key.weight", "attention.value.weight"),
        "fn.to_kv.weight",
        rearranged("(parts rows) dim -> parts rows dim", parts=2),
    ),
    *renamed({"attention.output": "fn.to_out"}),
]
CROSS_ATTENTION = WeightMapping([*renamed({"query_norm": "norm", "input_norm": "norm_context"}), *ATTENTION])
SELF_ATTENTION = WeightMapping([*renamed({"norm": "norm"}), *ATTENTION])
FEED_FORWARD = WeightMapping(renamed({"mlp_norm": "norm", "mlp.expand": "fn.net.0", "mlp.contract": "fn.net.2"}))
RESIDUAL = WeightMapping(
    Entry(f"{name}.weight", f"to_attn_logits.{i}.weight") for i, name in enumerate(("norm", "project", "expand"))
)


@printable_errors()
def load_perceiver_pytorch(
    state_dict: Mapping[str, Tensor] | str | os.PathLike[str], **arguments: Json
) -> Perceiver | PerceiverIO:
    """Load the weights of perceiver-pytorch's `Perceiver` or `PerceiverIO` into a model of this library.

    The model computes the same outputs as the original. The class is inferred from the weight names. Inputs have the
    same layout as in perceiver-pytorch, so images are `b h w c`. To pass queries to a `PerceiverIO`, call
    `model(data, mask=mask, query_inputs=queries)`.

    Args:
        state_dict: State dict of the original model (perceiver-pytorch 0.8 or newer), or path of a safetensors file.
            The tensors of a state dict are not copied, so the new model shares memory with them.
        arguments: Constructor arguments of the original model. `Perceiver` requires `max_freq`, unless
            `fourier_encode_data=False`. Pass `cross_heads`, `latent_heads`, `input_channels`, `input_axis` and
            `inverted_cross_attn` if they differ from perceiver-pytorch's defaults. Pass dropout rates if you want to
            train the model. The other arguments are inferred from the weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If `state_dict` is neither a state dict nor a path.
        TypeError: If `arguments` contains a name that is not an argument of the original constructor.
        ValueError: If an argument is not valid, does not match the weights, or is required but missing.
        ValueError: If `inverted_cross_attn` is not the same for all layers.
        ValueError: If weights are missing, are unexpected, or have the wrong shape.
        ValueError: If the weights do not have the same floating-point dtype, or are not finite.

    Example:
        >>> # the weights of Perceiver(depth=1, self_per_cross_attn=0, final_classifier_head=False, ...)
        >>> layers = {"attn.norm": (12,), "attn.norm_context": (29,), "attn.fn.to_out": (12, 8), "ff.norm": (12,)}
        >>> layers |= {"ff.fn.net.0": (96, 12), "ff.fn.net.2": (12, 48)}
        >>> weights = {f"layers.0.cross_{name}.weight": torch.randn(shape) for name, shape in layers.items()}
        >>> weights |= {f"layers.0.cross_{name}.bias": torch.randn(shape[0]) for name, shape in layers.items()}
        >>> weights["layers.0.cross_attn.fn.to_q.weight"] = torch.randn(8, 12)
        >>> weights["layers.0.cross_attn.fn.to_kv.weight"] = torch.randn(16, 29)
        >>> weights["latents"] = torch.randn(7, 12)
        >>> model = pc.interop.load_perceiver_pytorch(weights, max_freq=10.0, cross_heads=2)
        >>> model.adapter.positions.num_bands, model(torch.randn(2, 5, 11, 3)).shape
        (6, torch.Size([2, 7, 12]))

    Reference: lucidrains/perceiver-pytorch 0.11.0, `perceiver_pytorch.py` and `perceiver_io.py`.
    """
    weights = read_state_dict(state_dict)
    with errors_with_path(state_dict):
        return _load(weights, arguments)


def _load(weights: Mapping[str, Tensor], arguments: Mapping[str, Json]) -> Perceiver | PerceiverIO:
    layout = layout_of(weights)
    if layout is None:
        raise ValueError(
            "state_dict must be that of perceiver_pytorch's Perceiver or PerceiverIO, version 0.8 or newer; its first "
            f"names are {list(weights)[:5]}. Where theirs is a part of a model, take off what stands before 'latents'"
        )
    if unknown := sorted(arguments.keys() - ARGUMENTS[layout.model]):
        raise TypeError(
            f"perceiver_pytorch.{layout.model} takes no {unknown}; it takes {sorted(ARGUMENTS[layout.model])}"
        )
    checks.probability(**{name: rate for name, rate in arguments.items() if "dropout" in name})
    check_finite(weights)
    checked = CheckedArguments(weights, arguments)
    with torch.device("meta"):
        model, mapping = (_perceiver if layout.model == "Perceiver" else _perceiver_io)(checked, layout)
    translated = mapping.load(checked.weights, like=model.state_dict())
    check_floats(checked.weights)
    assign(model, translated)
    return model.eval()


def layout_of(names: Container[str]) -> Layout | None:
    """Return the element of `LAYOUTS` that matches the names in a state dict. Return None if no layout matches."""
    return next((layout for layout in LAYOUTS if f"{layout.read.format(0)}.norm_context.weight" in names), None)


def _perceiver(checked: CheckedArguments, layout: Layout) -> tuple[Perceiver, WeightMapping]:
    """Build this library's equivalent of perceiver-pytorch's `Perceiver`. Return the model and the weight mapping."""
    adapter = _grid(checked, f"{layout.read.format(0)}.norm_context.weight")
    depth, tied = checked.layers(first=1)
    self_attends = 0
    while f"{layout.self_attend.format(0, self_attends)}.0.norm.weight" in checked.weights:
        self_attends += 1
    residual = _attention_residual(checked)
    encoder = _encoder(
        checked,
        layout,
        partial(LatentTransformer),
        input_dim=adapter.dim,
        num_reads=depth,
        depth=checked.agreed("self_per_cross_attn", self_attends, layout.self_attend.format(0, "*")),
        share=sharing.all_but_first if tied else sharing.none,
        aggregate=residual,
    )
    entries = [Entry("encoder.latents", "latents")]
    for i in set(encoder.sharing.reads):  # i is also the index of the first layer with these weights
        entries += _read_entries(f"encoder.reads.{i}.", layout, i)
        for j in range(self_attends):
            entries += _self_attend_entries(f"encoder.transformers.{i}.blocks.{j}.", layout.self_attend.format(i, j))
        entries += RESIDUAL.within(f"encoder.aggregates.{i}.", f"attn_residuals.{i}.") if residual else []
    if not checked.agreed("final_classifier_head", "to_logits.2.weight" in checked.weights, "to_logits"):
        return Perceiver(adapter, encoder, heads_.Identity()), WeightMapping(entries)
    head = heads_.Classification(encoder.dim, checked.size("num_classes", "to_logits.2.weight"))
    entries += renamed({"head.norm": "to_logits.1", "head.logits": "to_logits.2"})
    return Perceiver(adapter, encoder, head), WeightMapping(entries)


def _perceiver_io(checked: CheckedArguments, layout: Layout) -> tuple[PerceiverIO, WeightMapping]:
    """Build this library's equivalent of perceiver-pytorch's `PerceiverIO`. Return the model and the weight mapping."""
    depth, tied = checked.layers(first=0)
    grid = Grid(checked.size("dim", f"{layout.read}.norm_context.weight"), positions=None)
    rate, blocks, residual = checked.get("seq_dropout_prob", 0.0), 1 if tied else depth, _attention_residual(checked)
    transformer = partial(LatentTransformer, num_repeats=depth if tied else 1, aggregate=residual)
    encoder = _encoder(checked, layout, transformer, input_dim=grid.dim, depth=blocks)
    entries = [Entry("encoder.latents", "latents"), *_read_entries("encoder.reads.0.", layout, 0)]
    for i in range(blocks):
        entries += _self_attend_entries(f"encoder.transformers.0.blocks.{i}.", layout.self_attend.format(i, 0))
        place = f"encoder.transformers.0.aggregates.{i}."
        entries += RESIDUAL.within(place, f"attn_residuals.{i}.") if residual else []
    decoder, decoder_entries = _decoder(checked, layout, encoder.dim)
    adapter = DropTokens(grid, rate=rate) if rate else grid
    model = PerceiverIO(adapter, encoder, queries.External(decoder.query_dim), decoder)
    return model, WeightMapping([*entries, *decoder_entries])


def _encoder(
    checked: CheckedArguments, layout: Layout, transformer: partial[LatentTransformer], **arguments: Any
) -> Encoder:
    """Build the encoder. `arguments` are `Encoder` arguments that differ between `Perceiver` and `PerceiverIO`."""
    kernel = {"kernel": inverted} if checked.same_for_all_layers("inverted_cross_attn") else {}
    cross_heads, cross_dim = checked.heads("cross", f"{layout.read.format(0)}.fn.to_q.weight", 1)
    key = f"{layout.self_attend.format(0, 0)}.0.fn.to_q.weight"
    heads, dim = checked.heads("latent", key, 8) if key in checked.weights else (1, 1)
    return Encoder(
        num_latents=checked.size("num_latents", "latents"),
        dim=checked.size("latent_dim", "latents", 1),
        num_heads=heads,
        cross_attention=partial(_cross_attend(checked, cross_dim, **kernel), num_heads=cross_heads),
        latent_transformer=partial(
            transformer, block=partial(SelfAttend, attention=_attention(checked, dim), mlp=_mlp(checked))
        ),
        **arguments,
    )


def _cross_attend(checked: CheckedArguments, qk_dim: int, **kernel: Any) -> partial[CrossAttend]:
    return partial(CrossAttend, attention=_attention(checked, qk_dim, **kernel), mlp=_mlp(checked))


def _attention(checked: CheckedArguments, qk_dim: int, **kernel: Any) -> partial[MultiHeadAttention]:
    """Return a factory of attention layers. The query, key and value projections have `qk_dim` outputs and no bias."""
    return partial(MultiHeadAttention, bias=False, qk_dim=qk_dim, dropout=checked.get("attn_dropout", 0.0), **kernel)


def _mlp(checked: CheckedArguments) -> partial[MLP]:
    return partial(MLP, widening_factor=4, activation=GEGLU(), dropout=checked.get("ff_dropout", 0.0))


def _attention_residual(checked: CheckedArguments) -> partial[AttentionResidual] | None:
    """Return a factory of `AttentionResidual` modules, or None if the original model has no attention residuals."""
    key = "attn_residuals.0.to_attn_logits.1.weight"
    if not checked.agreed("attn_residual", key in checked.weights, key):
        return None
    return partial(AttentionResidual, rank=checked.size("attn_residual_rank", key))


def _decoder(checked: CheckedArguments, layout: Layout, dim: int) -> tuple[Decoder, list[Entry]]:
    cross_heads, cross_dim = checked.heads("cross", f"{layout.read.format(0)}.fn.to_q.weight", 1)
    has_mlp = checked.agreed("decoder_ff", "decoder_ff.norm.weight" in checked.weights, "decoder_ff")
    has_logits = "to_logits.weight" in checked.weights
    read = partial(_cross_attend(checked, cross_dim), residual=False)  # the decoder is never inverted
    decoder = Decoder(
        dim,
        query_dim=checked.size("queries_dim", "decoder_cross_attn.norm.weight"),
        out_dim=checked.agreed("logits_dim", checked.length("to_logits.weight") if has_logits else None, "to_logits"),
        num_heads=cross_heads,
        cross_attention=read if has_mlp else partial(read, mlp=None),
    )
    entries = [*CROSS_ATTENTION.within("decoder.cross_attention.", "decoder_cross_attn.")]
    entries += FEED_FORWARD.within("decoder.cross_attention.", "decoder_ff.") if has_mlp else []
    return decoder, entries + (renamed({"decoder.output": "to_logits"}) if has_logits else [])


def _grid(checked: CheckedArguments, key: str) -> Grid:
    """Build the input adapter. The token width is inferred from the size of the weight named `key`.

    The adapter adds Fourier features, unless `fourier_encode_data` is False.
    """
    width = checked.length(key)
    if not checked.get("fourier_encode_data", True):
        return Grid(checked.agreed("input_channels", width, key), positions=None)
    axes, channels = checked.get("input_axis", 2), checked.get("input_channels", 3)
    highest = checked.get("max_freq", None)
    checks.positive(input_axis=axes, input_channels=channels)
    if isinstance(highest, bool) or not isinstance(highest, (int, float)) or not 0 < highest < math.inf:
        raise ValueError(f"max_freq must be given, a positive number, as the weights lack it; got {highest!r}")
    bands = checked.get("num_freq_bands", max(1, (width - channels - axes) // (2 * axes)))
    checks.positive(num_freq_bands=bands)
    if (expected := channels + axes * (2 * bands + 1)) != width:
        raise ValueError(
            f"input_channels={channels} + input_axis={axes} x (2 x num_freq_bands={bands} + 1) must be {width}, "
            f"the width of a token ({key}); got {expected}"
        )
    return Grid(channels, positions=FourierPerAxis(axes, bands, max_frequency=float(highest)))


def _read_entries(ours: str, layout: Layout, layer: int) -> list[Entry]:
    read, mlp = f"{layout.read.format(layer)}.", f"{layout.read_mlp.format(layer)}."
    return [*CROSS_ATTENTION.within(ours, read), *FEED_FORWARD.within(ours, mlp)]


def _self_attend_entries(ours: str, theirs: str) -> list[Entry]:
    return [*SELF_ATTENTION.within(ours, f"{theirs}.0."), *FEED_FORWARD.within(ours, f"{theirs}.1.")]
