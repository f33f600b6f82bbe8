"""Random models with their inputs: Perceiver, Perceiver IO, encoders, Perceiver AR, resamplers, hierarchies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import adapters, heads, masks, models, positions
from perceiver_core.models.perceiver_ar import CROSS_ATTENTION, LATENT_TRANSFORMER
from tests.robustness import composition_blocks as blocks
from tests.robustness import composition_inputs as inputs
from tests.robustness import composition_outputs as outputs
from tests.robustness.composition_draws import Draw
from tests.robustness.composition_inputs import Source
from tests.robustness.composition_positions import draw_positions


@dataclass
class Case:
    """Model, the arguments of its forward call, and the expected shape of its output.

    `shape` is the shape of the output without the batch axis, by modality if there are several; None if it is not
    known. `names` are the arguments of the parts that the model calls, which its errors may name.
    """

    model: nn.Module
    inputs: Any
    options: dict[str, Any] = field(default_factory=dict)
    shape: Any = None
    source: Source | None = None
    names: tuple[str, ...] = ()
    training: bool = False


def perceiver(draw: Draw) -> Case:
    source = inputs.draw_source(draw)
    encoder = blocks.draw_encoder(draw, outputs.width(source))
    head, shape = outputs.draw_latent_head(draw, encoder)
    model = draw.make(pc.Perceiver, source.adapter, encoder, head)
    return Case(model, source.inputs, dict(source.options), shape, source)


def perceiver_io(draw: Draw) -> Case:
    source = inputs.draw_source(draw)
    encoder = blocks.draw_encoder(draw, outputs.width(source))
    options, shape, head = dict(source.options), None, None
    if draw.flag(0.25):
        module, asked, each = outputs.multimodal(draw, source)
        decoder = outputs.draw_decoder(draw, encoder.dim, module.dim)
        made = {name: outputs.draw_query_head(draw, decoder.out_dim, own) for name, own in each.items()}
        head = draw.make(heads.Multimodal, {name: head for name, (head, _) in made.items()})
        shape = {name: own for name, (_, own) in made.items()}
        sizes: Any = {name: own.count for name, own in each.items()}
    else:
        query = draw.choice(*outputs.SIMPLE)(draw, source)
        module, asked, sizes = query.module, query.inputs, query.count
        decoder = outputs.draw_decoder(draw, encoder.dim, module.dim)
        if isinstance(source.adapter, adapters.TokenEmbedding) and decoder.out_dim == source.adapter.dim:
            head, shape = draw.choice(heads.TiedLogits, heads.Logits), (query.count, source.adapter.vocab_size)
        elif draw.flag(0.8):
            head, shape = outputs.draw_query_head(draw, decoder.out_dim, query)
        else:
            shape = (query.count, decoder.out_dim)
    model = draw.make(pc.PerceiverIO, source.adapter, encoder, module, decoder, head)
    if asked is not None:
        options["query_inputs"] = asked
    if draw.flag(0.2):
        valid = {
            name: draw.tensor(draw.batch, n) > -0.5
            for name, n in (sizes if shape_is_dict(sizes) else {"": sizes}).items()
        }
        options["query_mask"] = valid if shape_is_dict(sizes) else valid[""]
    return Case(model, source.inputs, options, shape, source)


def shape_is_dict(shape: object) -> bool:
    return isinstance(shape, dict)


def encoder(draw: Draw) -> Case:
    """Draw an encoder that is called with tokens or a tensor, and any attention mask."""
    source = inputs.plain(draw)
    n = source.inputs.shape[1] if isinstance(source.inputs, Tensor) else source.inputs.num_tokens
    model = blocks.draw_encoder(draw, outputs.width(source))
    m, options = model.latents.shape[0], {}
    kind = draw.choice("none", "keys", "keys", "padding", "attention", "window", "queries", "or")
    valid = draw.mask(n, empty=True)
    if kind == "attention":
        heads_of = model.reads[0].attention.num_heads
        options["mask"] = draw.tensor(draw.choice(1, max(draw.batch, 1)), draw.choice(1, heads_of), 1, n) > -0.3
    elif kind == "window":
        options["mask"] = masks.and_(masks.Causal(), masks.Window(draw.size(0, 3), draw.size(0, 3)))
    elif kind == "or" and valid is not None:
        options["mask"] = masks.or_(masks.Padding(valid), masks.Causal())
    elif valid is not None and kind != "none":
        options["mask"] = masks.Padding(valid) if kind == "padding" else valid
    if options and options["mask"] is not valid and draw.flag(0.5):  # the number of latents may change in training
        options["mask"] = masks.or_(options["mask"], masks.Window(1, 1))
    return Case(model, source.inputs, options, (-1 if model.latent_dropout else m, model.dim), source)


def perceiver_ar(draw: Draw) -> Case:
    source = inputs.token_ids(draw, 2 * draw.size(1, 4))
    n, num_heads, options = source.inputs.shape[1], draw.size(1, 3), {}
    rotary = source.adapter.positions is None or draw.flag()
    if draw.flag(0.3) and rotary:
        num_heads = 1
        options["cross_attention"], options["latent_transformer"] = CROSS_ATTENTION, LATENT_TRANSFORMER
    else:
        options["cross_attention"] = blocks.draw_cross_attention(draw, rotary=rotary, causal=True)
        options["latent_transformer"] = blocks.draw_latent_transformer(draw, num_heads, rotary=rotary, causal=True)
    if draw.flag(0.3):
        options["norm"] = blocks.draw_norm(draw)
    model = draw.make(
        pc.PerceiverAR,
        source.adapter,
        num_latents=draw.size(1, 8),
        depth=draw.size(0, 2),
        num_heads=num_heads,
        head=draw.choice(heads.TiedLogits, heads.Logits),
        prefix_dropout=draw.choice(0.0, 0.0, 0.5, 0.9),
        **options,
    )
    call: dict[str, Any] = {}
    if draw.flag(0.4) and draw.batch:
        left = torch.randint(n, (draw.batch, 1), generator=draw.generator)
        call["mask"] = torch.arange(n) >= left
    m = model.num_latents
    if draw.flag(0.3):
        call["num_latents"] = m = draw.size(1, 8)
    shape: tuple[int, ...] | None = (min(m, n), model.vocab_size)
    if draw.flag(0.3) and n > 1 and ("mask" not in call or bool(call["mask"][:, -2].any())):
        call["labels"], shape = source.inputs.long(), None
    return Case(model, source.inputs, call, shape, source)


def resampler(draw: Draw) -> Case:
    width, n, num_heads = draw.width(6), draw.size(1, 8), draw.size(1, 3)
    options: dict[str, Any] = {}
    if draw.flag():
        attention = blocks.draw_attention(draw, num_heads)
        options["block"] = draw.later(pc.JointAttend, attention=attention, **blocks.block_options(draw))
    else:
        width = width * num_heads
    dim = draw.choice(None, draw.width(6)) if "block" in options else draw.choice(None, num_heads * draw.size(1, 3))
    m = draw.size(1, 5)
    model = draw.make(
        pc.Resampler, width, num_latents=m, dim=dim, depth=draw.size(1, 3), num_heads=num_heads, **options
    )
    if draw.flag(0.4):
        mask = draw.mask(n, empty=True)
        return Case(model, draw.tensor(draw.batch, n, width), {} if mask is None else {"mask": mask}, (m, model.dim))
    frames = draw.size(1, 4)
    where = draw.choice(positions.LearnedEmbedding, positions.LearnedGrid)
    where = draw.make(where, frames + 1 if where is positions.LearnedEmbedding else (draw.size(1, 4),), width)
    kind = draw.choice(models.EachFrame, models.AllFrames)
    if kind is models.EachFrame and draw.flag():
        where = None
    model = draw.make(kind, model, frame_positions=where)
    mask = draw.mask(frames, n, empty=True)
    shape = (frames, m, model.dim) if kind is models.EachFrame else (m, model.dim)
    return Case(model, draw.tensor(draw.batch, frames, n, width), {} if mask is None else {"mask": mask}, shape)


def hierarchical(draw: Draw) -> Case:
    grid = (draw.size(1, 10),) if draw.flag(0.6) else (draw.size(1, 4), draw.size(1, 4))
    n, width = int(torch.tensor(grid).prod()), draw.size(1, 5)
    where = draw_positions(draw, len(grid), grid, depth=1)
    count = draw.size(1, 3)
    sizes = [(draw.choice(4, 3, 2, 1), draw.size(1, 3)) for _ in range(count)]

    def level(groups: int, latents: int) -> pc.Level:
        num_heads = draw.size(1, 2)
        dim, depth = num_heads * draw.size(1, 3), draw.size(0, 2)
        return draw.make(pc.Level, groups, num_latents=latents, dim=dim, depth=depth, num_heads=num_heads)

    levels = [level(*size) for size in sizes]
    opposites = sizes[-2::-1][: draw.size(0, count - 1)] if count > 1 else []
    options: dict[str, Any] = {"decoder_levels": [level(*size) for size in opposites]} if opposites else {}
    if draw.flag(0.4):
        options["cross_attention"] = blocks.draw_cross_attention(draw)
    model = draw.make(pc.HierarchicalPerceiver, width, levels=levels, positions=where, **options)
    draw.used.add("perceiver_core.blocks.grouped_read.GroupedRead")
    shape = (model.level.num_groups * model.level.num_latents, model.dim)
    if draw.flag():
        out = draw.choice(None, draw.size(1, 4))
        model = draw.make(models.HierarchicalAutoencoder, model, output_dim=out)
        shape = (n, out or width)
    mask = draw.mask(n)
    if len(grid) == 1 and draw.flag():
        return Case(model, draw.tensor(draw.batch, n, width), {} if mask is None else {"mask": mask}, shape)
    tokens = pc.Tokens(draw.tensor(draw.batch, *grid, width), mask=draw.mask(*grid))
    return Case(model, tokens, {} if mask is None or tokens.mask is not None else {"mask": mask}, shape)


def preset(draw: Draw) -> Case:
    """Draw a published model. Most are too large to run here: they run on the meta device, which computes shapes."""
    draw.dtype, draw.batch = torch.float32, 2
    if draw.flag(0.7):
        model = draw.make(models.presets.idefics2_resampler, 6, 4, hidden_dim=5)
        return Case(model, draw.tensor(2, 3, 6), {}, (64, 4))
    with torch.device("meta"):
        if draw.flag():
            model = draw.make(models.presets.hip_mini, 3, 40)
            return Case(model, torch.empty(2, 40, 3), {}, (128 * 16, 128))
        model = draw.make(models.presets.perceiver_ar, 11, context_length=16, num_latents=4, depth=2)
        return Case(model, torch.zeros(2, 9, dtype=torch.long), {}, (4, 11))


FAMILIES: dict[Callable[[Draw], Case], int] = {
    perceiver: 26,
    perceiver_io: 26,
    encoder: 12,
    perceiver_ar: 14,
    resampler: 8,
    hierarchical: 7,
    preset: 1,
}


def draw_case(draw: Draw) -> Case:
    """Draw a model and its inputs, both in the dtype of the case."""
    family = draw.random.choices(list(FAMILIES), list(FAMILIES.values()))[0]
    case = family(draw)
    case.training = draw.flag(0.25)
    shake(case.model, draw.generator)
    return case


def shake(model: nn.Module, generator: torch.Generator) -> None:
    """Perturb all parameters, because some start at zero or one, where errors would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.2)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Convert the model and its inputs to a dtype, in place."""
    case.model.to(dtype)
    case.inputs, case.options = converted(case.inputs, dtype), converted(case.options, dtype)
    return case


def converted(tree: Any, dtype: torch.dtype) -> Any:
    """Return a tree of arguments with all floating-point tensors in this dtype."""
    return torch.utils._pytree.tree_map(partial(_converted, dtype=dtype), tree)


def _converted(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
