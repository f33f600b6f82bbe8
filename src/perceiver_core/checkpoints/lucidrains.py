"""Models of perceiver-pytorch (lucidrains) as models of ours, from their weights and the arguments that made them.

Weights tell most of the arguments. They do not tell the highest frequency, how a width is cut into heads, and what is
dropped in training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_core import checks, queries, sharing
from perceiver_core import heads as answers
from perceiver_core.adapters import DropTokens, Grid
from perceiver_core.kernels import inverted
from perceiver_core.blocks import (
    GEGLU,
    MLP,
    AttentionResidual,
    CrossAttend,
    LatentTransformer,
    MultiHeadAttention,
    SelfAttend,
)
from perceiver_core.checkpoints.renamed import Source, Sources, both, fill, weights_of
from perceiver_core.checkpoints.told import Told
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.models import Perceiver, PerceiverIO
from perceiver_core.positions import FourierPerAxis


class Layout(NamedTuple):
    """What a version calls the modules of a model; {0} is the number of the layer, {1} that of the self-attend."""

    model: str
    read: str
    read_mlp: str
    think: str


LAYOUTS = (
    Layout("Perceiver", "layers.{0}.cross_attn", "layers.{0}.cross_ff", "layers.{0}.self_attns.{1}"),
    Layout("PerceiverIO", "cross_attend_block.cross_attn", "cross_attend_block.cross_ff", "layers.{0}.self_attns.{1}"),
    Layout("Perceiver", "layers.{0}.0", "layers.{0}.1", "layers.{0}.2.{1}"),  # these two from 0.8 to 0.10
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


def lucidrains(state_dict: Mapping[str, Tensor] | str | os.PathLike[str], **arguments: Any) -> Perceiver | PerceiverIO:
    """perceiver-pytorch's `Perceiver` or `PerceiverIO` as ours: the same answers, in evaluation mode.

    Names in the state dict tell which of the two it is. It takes what theirs takes: pictures are `b h w c`. Their
    `queries` are our `at`, `model(data, mask=mask, query_inputs=queries)`.

    Args:
        state_dict: of their model, of version 0.8 or newer; or the path of a safetensors file. Its tensors become the
            weights, without a copy.
        arguments: of their constructor, by name. Give `max_freq`, unless fourier_encode_data=False; `cross_heads`,
            `latent_heads`, `input_channels`, `input_axis` and `inverted_cross_attn` where they are not their defaults;
            and rates of dropout to train on. The others are read from the weights, and need not be given.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a model rather than its state dict; an argument that their constructor does not have.
        ValueError: arguments that do not go with the weights; weights that are missing, unknown or of another shape;
            `inverted_cross_attn` that is not the same for all layers.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> # what Perceiver(depth=1, self_per_cross_attn=0, final_classifier_head=False, ...) has
        >>> layers = {"attn.norm": (12,), "attn.norm_context": (29,), "attn.fn.to_out": (12, 8), "ff.norm": (12,)}
        >>> layers |= {"ff.fn.net.0": (96, 12), "ff.fn.net.2": (12, 48)}
        >>> weights = {f"layers.0.cross_{name}.weight": torch.randn(shape) for name, shape in layers.items()}
        >>> weights |= {f"layers.0.cross_{name}.bias": torch.randn(shape[0]) for name, shape in layers.items()}
        >>> weights["layers.0.cross_attn.fn.to_q.weight"] = torch.randn(8, 12)
        >>> weights["layers.0.cross_attn.fn.to_kv.weight"] = torch.randn(16, 29)
        >>> weights["latents"] = torch.randn(7, 12)
        >>> model = pc.checkpoints.lucidrains(weights, max_freq=10.0, cross_heads=2)
        >>> model.adapter.positions.num_bands, model(torch.randn(2, 5, 11, 3)).shape
        (6, torch.Size([2, 7, 12]))

    Reference: lucidrains/perceiver-pytorch 0.11.0, `perceiver_pytorch.py` and `perceiver_io.py`.
    """
    if not isinstance(state_dict, (Mapping, str, os.PathLike)):
        raise TypeError(f"state_dict must be one, or a path; got {type(state_dict).__name__}. Give model.state_dict()")
    weights = weights_of(state_dict)
    layout = next((names for names in LAYOUTS if f"{names.read.format(0)}.norm_context.weight" in weights), None)
    if layout is None:
        raise ValueError(
            "state_dict must be that of perceiver_pytorch's Perceiver or PerceiverIO, version 0.8 or newer; its first "
            f"names are {list(weights)[:5]}. Where theirs is a part of a model, take off what stands before 'latents'"
        )
    _check_arguments(layout.model, arguments)
    told = Told(weights, arguments)
    with torch.device("meta"):
        model, sources = (_perceiver if layout.model == "Perceiver" else _perceiver_io)(told, layout)
    fill(model, sources, told.weights)
    return model.eval()


def _check_arguments(model: str, arguments: dict[str, Any]) -> None:
    if unknown := sorted(arguments.keys() - ARGUMENTS[model]):
        raise TypeError(f"perceiver_pytorch.{model} takes no {unknown}; it takes {sorted(ARGUMENTS[model])}")
    checks.probability(**{name: rate for name, rate in arguments.items() if "dropout" in name})


class _Parts(NamedTuple):
    """What both models are made of, and their heads."""

    heads: tuple[int, int]  # of reads, of self-attends
    read: partial[CrossAttend]
    answer: partial[CrossAttend]  # the decoder's read, never inverted
    block: partial[SelfAttend]
    pool: partial[AttentionResidual] | None


def _parts(told: Told, layout: Layout, mlp: partial[MLP]) -> _Parts:
    cross, cross_dim = told.heads("cross", f"{layout.read.format(0)}.fn.to_q.weight", 1)
    thinks = f"{layout.think.format(0, 0)}.0.fn.to_q.weight"
    latent, latent_dim = told.heads("latent", thinks, 8) if thinks in told.weights else (1, 1)
    # Their heads have a width of their own; queries, keys and values no bias.
    attention = partial(MultiHeadAttention, bias=False, dropout=told.get("attn_dropout", 0.0))
    cross_attention = partial(attention, qk_dim=cross_dim)
    reads = partial(cross_attention, kernel=inverted) if _inverted(told) else cross_attention
    return _Parts(
        (cross, latent),
        partial(CrossAttend, attention=reads, mlp=mlp),
        partial(CrossAttend, attention=cross_attention, mlp=mlp, residual=False),
        partial(SelfAttend, attention=partial(attention, qk_dim=latent_dim), mlp=mlp),
        _pool(told),
    )


def _inverted(told: Told) -> bool:
    """Whether latents compete for tokens, in all layers."""
    of_layers = told.get("inverted_cross_attn", False)
    found = {*of_layers} if isinstance(of_layers, (tuple, list)) else {of_layers}
    if found not in ({True}, {False}):
        raise ValueError(f"inverted_cross_attn must be True or False, the same for all layers; got {of_layers!r}")
    return found == {True}


def _pool(told: Told) -> partial[AttentionResidual] | None:
    """What makes their attention residuals, if they have some."""
    key = "attn_residuals.0.to_attn_logits.1.weight"
    if not told.agreed("attn_residual", key in told.weights, key):
        return None
    return partial(AttentionResidual, rank=told.size("attn_residual_rank", key))


def _perceiver(told: Told, layout: Layout) -> tuple[Perceiver, Sources]:
    """Their Perceiver without weights, and where these come from."""
    mlp = partial(MLP, widening_factor=4, activation=GEGLU(), dropout=told.get("ff_dropout", 0.0))
    parts = _parts(told, layout, mlp)
    adapter = _grid(told, f"{layout.read.format(0)}.norm_context.weight")
    depth, tied = told.layers(first=1)
    thinks = _count(told, layout.think)
    encoder = Encoder(
        adapter.dim,
        num_latents=told.size("num_latents", "latents"),
        dim=told.size("latent_dim", "latents", 1),
        num_reads=depth,
        depth=told.agreed("self_per_cross_attn", thinks, layout.think.format(0, "*")),
        num_heads=parts.heads[1],
        share=sharing.all_but_first if tied else sharing.none,
        cross_attention=partial(parts.read, num_heads=parts.heads[0]),
        latent_transformer=partial(LatentTransformer, block=parts.block),
        aggregate=parts.pool,
    )
    sources = {"encoder.latents": Source("latents")}
    for number in set(encoder.sharing.reads):  # which is also the number of the first layer that has these weights
        read, read_mlp = layout.read.format(number), layout.read_mlp.format(number)
        sources |= _read(f"encoder.reads.{number}", read) | _mlp(f"encoder.reads.{number}", read_mlp)
        for index in range(thinks):
            sources |= _think(f"encoder.transformers.{number}.blocks.{index}", layout.think.format(number, index))
        sources |= _residual(f"encoder.aggregates.{number}", number) if parts.pool else {}
    if not told.agreed("final_classifier_head", "to_logits.2.weight" in told.weights, "to_logits"):
        return Perceiver(adapter, encoder, answers.Identity()), sources
    head = answers.Classification(encoder.dim, told.size("num_classes", "to_logits.2.weight"))
    return Perceiver(adapter, encoder, head), sources | both("head.norm", "to_logits.1") | both(
        "head.logits", "to_logits.2"
    )


def _perceiver_io(told: Told, layout: Layout) -> tuple[PerceiverIO, Sources]:
    """Their PerceiverIO without weights, and where these come from."""
    mlp = partial(MLP, widening_factor=4, activation=GEGLU())
    parts = _parts(told, layout, mlp)
    depth, tied = told.layers(first=0)
    grid = Grid(told.size("dim", f"{layout.read}.norm_context.weight"), positions=None)
    rate = told.get("seq_dropout_prob", 0.0)
    adapter = DropTokens(grid, rate=rate) if rate else grid
    encoder = Encoder(
        adapter.dim,
        num_latents=told.size("num_latents", "latents"),
        dim=told.size("latent_dim", "latents", 1),
        depth=1 if tied else depth,
        num_heads=parts.heads[1],
        cross_attention=partial(parts.read, num_heads=parts.heads[0]),
        latent_transformer=partial(LatentTransformer, block=parts.block, num_repeats=depth if tied else 1, aggregate=parts.pool),
    )
    sources = {"encoder.latents": Source("latents")}
    sources |= _read("encoder.reads.0", layout.read) | _mlp("encoder.reads.0", layout.read_mlp)
    for index in range(1 if tied else depth):
        sources |= _think(f"encoder.transformers.0.blocks.{index}", layout.think.format(index, 0))
        sources |= _residual(f"encoder.transformers.0.aggregates.{index}", index) if parts.pool else {}
    decoder, answered = _decoder(told, encoder.dim, parts)
    return PerceiverIO(adapter, encoder, queries.External(decoder.query_dim), decoder), sources | answered


def _decoder(told: Told, dim: int, parts: _Parts) -> tuple[Decoder, Sources]:
    has_mlp = told.agreed("decoder_ff", "decoder_ff.norm.weight" in told.weights, "decoder_ff")
    has_logits = "to_logits.weight" in told.weights
    out = told.length("to_logits.weight") if has_logits else None
    decoder = Decoder(
        dim,
        query_dim=told.size("queries_dim", "decoder_cross_attn.norm.weight"),
        out_dim=told.agreed("logits_dim", out, "to_logits"),
        num_heads=parts.heads[0],
        cross_attention=parts.answer if has_mlp else partial(parts.answer, mlp=None),
    )
    sources = _read("decoder.cross_attention", "decoder_cross_attn")
    sources |= _mlp("decoder.cross_attention", "decoder_ff") if has_mlp else {}
    return decoder, sources | (both("decoder.output", "to_logits") if has_logits else {})


def _grid(told: Told, key: str) -> Grid:
    """Their Fourier features and what they stand beside."""
    width = told.length(key)
    if not told.get("fourier_encode_data", True):
        return Grid(told.agreed("input_channels", width, key), positions=None)
    axes, channels, highest = told.get("input_axis", 2), told.get("input_channels", 3), told.get("max_freq", None)
    checks.positive(input_axis=axes, input_channels=channels)
    if isinstance(highest, bool) or not isinstance(highest, (int, float)) or not 0 < highest < math.inf:
        raise ValueError(f"max_freq must be given, a positive number, since weights do not tell it; got {highest!r}")
    bands = told.get("num_freq_bands", max(1, (width - channels - axes) // (2 * axes)))
    checks.positive(num_freq_bands=bands)
    made = channels + axes * (2 * bands + 1)
    if made != width:
        raise ValueError(
            f"input_channels={channels} + input_axis={axes} x (2 x num_freq_bands={bands} + 1) must be {width}, "
            f"the width of what is read ({key}); got {made}"
        )
    return Grid(channels, positions=FourierPerAxis(axes, bands, max_frequency=float(highest)))


def _count(told: Told, think: str) -> int:
    """How many self-attends follow a read."""
    count = 0
    while f"{think.format(0, count)}.0.norm.weight" in told.weights:
        count += 1
    return count


def _read(ours: str, theirs: str) -> Sources:
    norms = both(f"{ours}.query_norm", f"{theirs}.norm") | both(f"{ours}.input_norm", f"{theirs}.norm_context")
    return norms | _attention(f"{ours}.attention", f"{theirs}.fn")


def _think(ours: str, theirs: str) -> Sources:
    attention = both(f"{ours}.norm", f"{theirs}.0.norm") | _attention(f"{ours}.attention", f"{theirs}.0.fn")
    return attention | _mlp(ours, f"{theirs}.1")


def _attention(ours: str, theirs: str) -> Sources:
    return {
        f"{ours}.query.weight": Source(f"{theirs}.to_q.weight"),
        f"{ours}.key.weight": Source(f"{theirs}.to_kv.weight", 0, 2),  # one matrix for both
        f"{ours}.value.weight": Source(f"{theirs}.to_kv.weight", 1, 2),
        **both(f"{ours}.output", f"{theirs}.to_out"),
    }


def _residual(ours: str, layer: int) -> Sources:
    names = enumerate(("norm", "project", "expand"))
    return {f"{ours}.{name}.weight": Source(f"attn_residuals.{layer}.to_attn_logits.{i}.weight") for i, name in names}


def _mlp(ours: str, theirs: str) -> Sources:
    layers = both(f"{ours}.mlp.expand", f"{theirs}.fn.net.0") | both(f"{ours}.mlp.contract", f"{theirs}.fn.net.2")
    return both(f"{ours}.mlp_norm", f"{theirs}.norm") | layers
