"""Random queries, decoders and heads, with the shapes of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, heads, queries
from tests.robustness.composition_blocks import draw_cross_attention, draw_norm
from tests.robustness.composition_draws import Draw, shown
from tests.robustness.composition_inputs import Source
from tests.robustness.composition_positions import draw_point_features, draw_positions


class DrawnQueries(NamedTuple):
    """Query module, its argument `query_inputs`, the number of queries, and their grid if they cover all of it."""

    module: nn.Module
    inputs: Any
    count: int
    grid: tuple[int, ...] | None = None


def _indices(draw: Draw, count: int) -> Any:
    """Draw query indices `q` or `b q`, or None for all queries."""
    if draw.flag(0.6):
        return None
    shape = (draw.size(1, 5),) if draw.flag() else (draw.batch, draw.size(1, 5))
    return torch.randint(count, shape, generator=draw.generator)


def _selected(module: nn.Module, indices: Any, count: int, grid: tuple[int, ...] | None = None) -> DrawnQueries:
    if indices is None:
        return DrawnQueries(module, None, count, grid)
    return DrawnQueries(module, indices, indices.shape[-1])


def external(draw: Draw, source: Source) -> DrawnQueries:
    dim, q = draw.width(6), draw.size(1, 6)
    x = draw.tensor(q, dim) if draw.flag() else draw.tensor(draw.batch, q, dim)
    return DrawnQueries(draw.make(queries.External, dim), x, q)


def coordinates(draw: Draw, source: Source) -> DrawnQueries:
    axes, q = draw.choice(1, 2, 3), draw.size(1, 6)
    x = draw.tensor(q, axes) if draw.flag() else draw.tensor(draw.batch, q, axes)
    return DrawnQueries(draw.make(queries.Coordinates, draw_point_features(draw, axes)), x, q)


def learned(draw: Draw, source: Source) -> DrawnQueries:
    q = draw.size(1, 6)
    return _selected(draw.make(queries.Learned, q, draw.width(6)), _indices(draw, q), q)


def grid(draw: Draw, source: Source) -> DrawnQueries:
    own = source.grid is None or not _keeps_grid(source) or draw.flag()
    size = tuple(draw.size(1, 4) for _ in range(draw.choice(1, 2, 3))) if own else source.grid
    assert size is not None
    endpoint = draw.flag(0.7)
    where = draw_positions(draw, len(size), size, depth=1) if endpoint else draw_point_features(draw, len(size))
    module = draw.make(queries.Grid, size if own else None, where, endpoint=endpoint)
    return _selected(module, _indices(draw, prod(size)), prod(size), size)


def from_inputs(draw: Draw, source: Source) -> DrawnQueries:
    if source.grid is None or not _keeps_grid(source):
        return learned(draw, source)
    module = draw.make(queries.FromInputs, width(source))
    on_grid = None if isinstance(source.inputs, torch.Tensor) and type(source.adapter) is nn.Identity else source.grid
    return _selected(module, _indices(draw, prod(source.grid)), prod(source.grid), on_grid)


def _keeps_grid(source: Source) -> bool:
    """Return whether the encoder gets `Tokens` with the grid `source.grid`, in training too."""
    if isinstance(source.adapter, (adapters.DropTokens, adapters.PerRead)):
        return False
    return not (type(source.adapter) is nn.Identity and isinstance(source.inputs, torch.Tensor))


def width(source: Source) -> Any:
    """Return the width of the tokens of a source."""
    if type(source.adapter) is not nn.Identity:
        return source.adapter.dim
    return source.inputs.shape[-1] if isinstance(source.inputs, torch.Tensor) else source.inputs.dim


SIMPLE = (external, coordinates, learned, grid, grid, from_inputs)


def multimodal(draw: Draw, source: Source) -> tuple[nn.Module, Any, dict[str, DrawnQueries]]:
    names = draw.random.sample(["flow", "wave", "class"], draw.choice(1, 2, 3))
    nowhere = source._replace(grid=None)
    each = {name: draw.choice(external, coordinates, learned, grid)(draw, nowhere) for name in names}
    sources = {name: drawn.module for name, drawn in each.items()}
    module = draw.make(queries.Multimodal, sources, min_modality_channels=draw.size(1, 3))
    inputs = {name: drawn.inputs for name, drawn in each.items() if drawn.inputs is not None}
    return module, inputs or None, each


def draw_decoder(draw: Draw, dim: int, query_dim: int) -> pc.Decoder:
    num_heads, cross_attention = draw_cross_attention(draw, decoder=True)
    competes = "inverted" in shown(cross_attention)  # chunks of queries would change the result
    return draw.make(
        pc.Decoder,
        dim,
        query_dim=query_dim,
        out_dim=draw.choice(None, draw.size(1, 6)),
        num_heads=num_heads,
        cross_attention=cross_attention,
        chunk_size=None if competes else draw.choice(None, draw.size(1, 3)),
    )


def draw_query_head(draw: Draw, dim: int, drawn: DrawnQueries) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw a head for decoder outputs of width `dim`. Return it and the shape of its output without the batch axis."""
    q = drawn.count
    kinds = ["identity", "linear", "wave"] + ["single"] * 4 * (q == 1) + ["grid"] * 2 + ["patches"] * 2
    kind = draw.choice(*kinds)
    if kind == "wave":
        patch, channels = draw.size(1, 3), draw.size(1, 2)
        head = draw.make(heads.Waveform, dim, patch, num_channels=channels)
        return head, (q * patch,) if channels == 1 else (channels, q * patch)
    if kind == "single":
        return draw.make(heads.SingleQuery, draw.make(heads.Linear, dim, 3)), (3,)
    all_decoded = drawn.inputs is None or isinstance(drawn.module, (queries.External, queries.Coordinates))
    if kind == "grid":
        size = drawn.grid or (q,)
        inner = draw.make(heads.Linear, dim, draw.size(1, 3)) if draw.flag() else None
        channels = dim if inner is None else inner.values.out_features
        axis = draw.choice(-1, *range(1, len(size) + 2))
        own = size if drawn.grid is None or draw.flag() else None
        head = draw.make(heads.Grid, own, head=inner, scale=draw.choice(1.0, 0.01), channel_axis=axis)
        shape = [*size]
        shape.insert(len(size) if axis == -1 else axis - 1, channels)
        return head, tuple(shape) if drawn.inputs is None else (q, channels)
    if kind == "patches" and drawn.grid is not None and len(drawn.grid) in (2, 3) and all_decoded:
        patch, channels = [draw.size(1, 3) for _ in drawn.grid], draw.size(1, 2)
        head = draw.make(heads.Unpatchify, dim, grid=drawn.grid, patch_size=patch, num_channels=channels)
        full = [n * p for n, p in zip(drawn.grid, patch, strict=True)]
        return head, (*full[:-2], channels, *full[-2:])
    if kind == "linear":
        return draw.make(heads.Linear, dim, 3), (q, 3)
    return draw.make(draw.choice(heads.Identity, nn.Identity)), (q, dim)


def draw_latent_head(draw: Draw, encoder: pc.Encoder) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Draw a head for latents, and return it with the shape of its output without the batch axis."""
    dim, m = encoder.dim, encoder.latents.shape[0]
    if encoder.latent_dropout is not None and not isinstance(encoder.latent_dropout, nn.Identity):
        m = -1  # in training, fewer latents
    kind = draw.choice("classes", "classes", "values", "mean", "identity", "linear", "logits", "wave")
    options: dict[str, Any] = {"norm": draw_norm(draw)} if draw.flag() else {}
    if draw.flag(0.2):
        options["dropout"] = 0.3
    if kind == "classes":
        return draw.make(heads.Classification, dim, 3, **options), (3,)
    if kind == "values":
        return draw.make(heads.Regression, dim, 2, **options), (2,)
    if kind == "mean":
        return draw.make(heads.LatentMean, dim, **options), (dim,)
    if kind == "linear":
        return draw.make(heads.Linear, dim, 3), (m, 3)
    if kind == "wave":
        return draw.make(heads.Waveform, dim, 2), (-1,)
    if kind == "logits":
        return draw.make(heads.Logits, draw.make(adapters.TokenEmbedding, 5, dim)), (m, 5)
    return draw.make(heads.Identity), (m, dim)


def fits(actual: Sequence[int], expected: Sequence[int]) -> bool:
    """Return whether a shape is the expected one; -1 stands for any size."""
    return len(actual) == len(expected) and all(n in (own, -1) for own, n in zip(actual, expected, strict=True))
