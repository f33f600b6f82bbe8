"""Random adapters with an input, a mask and lengths for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perceiver_core import Tokens, adapters, positions
from tests.robustness.composition_draws import Draw
from tests.robustness.composition_positions import draw_point_features, draw_positions

FREQUENCIES = (adapters.htk_frequencies, adapters.slaney_frequencies)


class Source(NamedTuple):
    """Adapter and its input.

    `options` holds the mask and the lengths. `spoil(inputs, options)` returns the input with NaN in place of all values
    that the options mask; None if the adapter has no such values. `grid` is the grid of the tokens, or None for several
    inputs.
    """

    adapter: nn.Module
    inputs: Any
    options: dict[str, Any]
    grid: tuple[int, ...] | None
    spoil: Callable[[Any, dict[str, Any]], Any] | None = None


def expand(mask: Tensor, grid_axes: Sequence[int], stride: Sequence[int], like: Tensor) -> Tensor:
    """Expand a token mask `b *grid` to the elements of an input. Tokens have these strides along `grid_axes`."""
    for axis, (own, step) in enumerate(zip(grid_axes, stride, strict=True), start=1):
        mask = mask.repeat_interleave(step, dim=axis).narrow(axis, 0, like.shape[own])
    shape = [like.shape[0]] + [like.shape[a] if a - like.ndim in grid_axes else 1 for a in range(1, like.ndim)]
    return mask.reshape(shape)


def _spoiler(adapter: Any, stride: Sequence[int]) -> Callable[[Any, dict[str, Any]], Any]:
    def spoil(x: Tensor, options: dict[str, Any]) -> Tensor:
        axes = adapter.axes_of(x.ndim)
        if options.get("mask") is not None:
            x = x.masked_fill(~expand(options["mask"], axes, stride, x), torch.nan)
        if options.get("lengths") is not None:
            lengths = torch.as_tensor(options["lengths"])
            lengths = lengths[:, None] if lengths.ndim == 1 else lengths
            of = axes if lengths.shape[1] == len(axes) else (axes[adapter.time_axis],)
            for column, axis in enumerate(of):
                index = torch.arange(x.shape[axis]).reshape([-1] + [1] * (-axis - 1))
                own = lengths[:, column].reshape(-1, *[1] * (x.ndim - 1))
                x = x.masked_fill(index >= own, torch.nan)
        return x

    return spoil


def _options(
    draw: Draw, adapter: Any, sizes: Sequence[int], grid: Sequence[int], *, shortest: int = 1
) -> dict[str, Any]:
    """Draw a mask, lengths or neither. Lengths are at least `shortest`: shorter inputs have no tokens."""
    options: dict[str, Any] = {}
    if draw.flag(0.25) and draw.batch:
        lengths = torch.tensor([[draw.random.randint(shortest, size) for size in sizes] for _ in range(draw.batch)])
        one = adapter.time_axis is not None and (len(sizes) == 1 or draw.flag())
        lengths = lengths[:, 0 if len(sizes) == 1 else adapter.time_axis] if one else lengths
        options["lengths"] = lengths.tolist() if draw.flag() else lengths
    elif (mask := draw.mask(*grid)) is not None:
        options["mask"] = mask
    return options


def _grid_source(draw: Draw, adapter: Any, x: Tensor, sizes: Sequence[int], stride: Sequence[int]) -> Source:
    grid = tuple(-(-size // step) for size, step in zip(sizes, stride, strict=True))
    return Source(adapter, x, _options(draw, adapter, sizes, grid), grid, _spoiler(adapter, stride))


def image(draw: Draw) -> Source:
    size, channels = (draw.size(1, 9), draw.size(1, 9)), draw.size(1, 3)
    stems = ["pixels", "pixels", "patches", "project"] + ["symmetric"] * 3 * (min(size) >= 5)
    stems += ["conv"] * 2 * (draw.batch != 1 or max(size) > 4)  # batch norm needs more than one value in training
    kind = draw.choice(*stems)
    stride, options = (1, 1), {}
    if kind == "patches":
        stride = (draw.size(1, 4), draw.size(1, 4))
        options["stem"] = draw.later(adapters.Patches, patch_size=stride)
    elif kind == "project":
        options["stem"] = draw.later(adapters.Project, dim=draw.size(1, 5))
    elif kind in ("conv", "symmetric"):
        stride = (4, 4)
        stem = adapters.ConvStem if kind == "conv" else adapters.SymmetricPadConvStem
        options["stem"] = draw.later(stem, dim=draw.size(1, 5))
    elif draw.flag():
        options["stem"] = draw.later(adapters.Pixels)
    grid = tuple(-(-n // step) for n, step in zip(size, stride, strict=True))
    if kind == "symmetric":
        grid = tuple(((n + 1) // 2 - 1) // 2 for n in size)
    where = draw_positions(draw, 2, grid)
    adapter = draw.make(adapters.Image, channels, positions=where, **options)
    x = draw.tensor(draw.batch, channels, *size)
    if kind == "symmetric":
        return Source(adapter, x, _options(draw, adapter, size, grid, shortest=5), grid)
    source = _grid_source(draw, adapter, x, size, stride)
    return source._replace(spoil=None) if kind == "conv" else source


def audio(draw: Draw) -> Source:
    samples, patch, channels = draw.size(1, 30), draw.size(1, 5), draw.size(1, 2)
    where = draw_positions(draw, 1, (-(-samples // patch),))
    adapter = draw.make(adapters.Audio, patch, positions=where, num_channels=channels)
    mono = channels == 1 and draw.flag()
    x = draw.tensor(draw.batch, samples) if mono else draw.tensor(draw.batch, channels, samples)
    return _grid_source(draw, adapter, x, (samples,), (patch,))


def spectrogram(draw: Draw) -> Source:
    size = draw.size(1, 6), draw.size(1, 6)
    adapter = draw.make(adapters.Spectrogram, positions=draw_positions(draw, 2, size))
    return _grid_source(draw, adapter, draw.tensor(draw.batch, *size), size, (1, 1))


def log_mel(draw: Draw) -> Source:
    n_fft, hop, bands = draw.choice(6, 7, 8), draw.size(1, 5), draw.choice(1, 2, 3)
    mels, samples = bands * draw.size(1, 3), draw.size(1, 30)
    frames = (samples - n_fft % 2) // hop + 1
    grid = (frames,) if bands == 1 else (bands, frames)
    where = draw_positions(draw, len(grid), grid)
    adapter = draw.make(
        adapters.LogMel,
        draw.choice(100, 44.1),
        positions=where,
        num_mels=mels,
        n_fft=n_fft,
        hop_length=hop,
        win_length=draw.choice(None, n_fft - 1),
        tokens_per_frame=bands,
        f_min=draw.choice(0.0, 2.0),
        frequencies=draw.choice(*FREQUENCIES),
        area_norm=draw.flag(),
        window=adapters.hann_window,
        floor=draw.choice(1e-3, 1e-6),
    )
    draw.used.update(f"{f.__module__}.{getattr(f, '__qualname__', f)}" for f in (adapter.frequencies, adapter.window))
    options: dict[str, Any] = {}
    if (mask := draw.mask(*grid)) is not None:
        options["mask"] = mask
    return Source(adapter, draw.tensor(draw.batch, samples), options, grid)


def video(draw: Draw) -> Source:
    size, patch, channels = [draw.size(1, 4) for _ in range(3)], [draw.size(1, 3) for _ in range(3)], draw.size(1, 2)
    where = draw_positions(draw, 3, [-(-n // p) for n, p in zip(size, patch, strict=True)])
    adapter = draw.make(adapters.Video, channels, positions=where, patch_size=patch)
    return _grid_source(draw, adapter, draw.tensor(draw.batch, size[0], channels, *size[1:]), size, patch)


def frame_pair(draw: Draw) -> Source:
    size, channels = (draw.size(1, 5), draw.size(1, 5)), draw.size(1, 2)
    where, patch, dim = draw_positions(draw, 2, size), draw.choice(1, 3), draw.size(1, 6)
    adapter = draw.make(adapters.FramePair, positions=where, num_channels=channels, patch_size=patch, dim=dim)
    return _grid_source(draw, adapter, draw.tensor(draw.batch, 2, channels, *size), size, (1, 1))


def grid(draw: Draw) -> Source:
    size, channels = [draw.size(1, 4) for _ in range(draw.choice(1, 2, 3, 4))], draw.size(1, 4)
    adapter = draw.make(adapters.Grid, channels, positions=draw_positions(draw, len(size), size))
    return _grid_source(draw, adapter, draw.tensor(draw.batch, *size, channels), size, (1,) * len(size))


def point_cloud(draw: Draw) -> Source:
    axes, features, n = draw.choice(1, 2, 3), draw.size(0, 3), draw.size(1, 9)
    adapter = draw.make(adapters.PointCloud, features, positions=draw_point_features(draw, axes))
    return _grid_source(draw, adapter, draw.tensor(draw.batch, n, axes + features), (n,), (1,))


def table(draw: Draw) -> Source:
    numeric, sizes = draw.size(0, 3), [draw.size(1, 5) for _ in range(draw.size(0, 3))]
    numeric = numeric if sizes else max(1, numeric)
    adapter = draw.make(adapters.Table, numeric, sizes, dim=draw.size(1, 6))
    numbers = draw.tensor(draw.batch, numeric)
    if numeric:
        missing = draw.tensor(draw.batch, numeric) > 0.5
        missing[:, 0] &= bool(sizes)
        numbers = numbers.masked_fill(missing, torch.nan)
    rows = {"numbers": numbers} if numeric else {}
    if sizes:
        categories = [torch.randint(n, (draw.batch,), generator=draw.generator) for n in sizes]
        rows["categories"] = torch.stack(categories, dim=1)
    one = not sizes and draw.flag()
    return Source(adapter, numbers if one else rows, {}, (numeric + len(sizes),))


def label(draw: Draw) -> Source:
    classes = draw.size(1, 5)
    adapter = draw.make(adapters.OneHotLabel, classes)
    x = draw.tensor(draw.batch, classes).abs() if draw.flag(0.3) else draw.integers(classes, draw.batch)
    return Source(adapter, x, {}, (1,))


def token_ids(draw: Draw, dim: int | None = None) -> Source:
    dim, n = draw.size(1, 8) if dim is None else dim, draw.size(1, 12)
    where = None
    if draw.flag():
        where = draw.make(positions.LearnedEmbedding, n + draw.size(0, 3), dim)
    include = draw.flag()
    if draw.flag(0.3):
        adapter = draw.make(adapters.Bytes, dim, positions=where, positions_include_padding=include)
    else:
        vocab = draw.size(1, 11)
        adapter = draw.make(adapters.TokenEmbedding, vocab, dim, positions=where, positions_include_padding=include)
    x = draw.integers(adapter.vocab_size, draw.batch, n)
    return Source(adapter, x, _options(draw, adapter, (n,), (n,)), (n,))


SIMPLE = (*(image, image, audio, spectrogram, log_mel, video, frame_pair, grid, point_cloud, table, label, token_ids),)


def dropped(draw: Draw) -> Source:
    source = draw_source(draw, simple=True)
    adapter = draw.make(adapters.DropTokens, source.adapter, rate=draw.choice(0.0, 0.3, 0.9))
    return source._replace(adapter=adapter)


def multimodal(draw: Draw) -> Source:
    names = draw.random.sample(["image", "audio", "text", "label"], draw.choice(1, 2, 3))
    sources = {name: draw_source(draw, simple=True) for name in names}
    rates = {name: draw.choice(0.0, 0.5, 1.0) for name in names if draw.flag(0.3)}
    dropout = {name: draw.choice(0.0, 0.5, 1.0) for name in names if draw.flag(0.3)}
    adapter = draw.make(
        adapters.Multimodal,
        {name: source.adapter for name, source in sources.items()},
        min_modality_channels=draw.size(1, 3),
        token_mask_rate=rates,
        modality_dropout=dropout,
    )
    if len(names) > 1 and draw.flag(0.3):
        del sources[names[-1]]
    inputs = {name: source.inputs for name, source in sources.items()}
    options: dict[str, Any] = {}
    for key in ("mask", "lengths"):
        if own := {name: source.options[key] for name, source in sources.items() if key in source.options}:
            options[key] = own
    count = sum(prod(source.grid or ()) for source in sources.values())
    return Source(adapter, inputs, options, (count,))


def per_read(draw: Draw) -> Source:
    sources = [draw_source(draw, simple=True) for _ in range(draw.choice(1, 2, 3))]
    adapter = draw.make(adapters.PerRead, [source.adapter for source in sources])
    options: dict[str, Any] = {}
    for key in ("mask", "lengths"):
        if any(key in source.options for source in sources):
            options[key] = [source.options.get(key) for source in sources]
    return Source(adapter, [source.inputs for source in sources], options, None)


def plain(draw: Draw) -> Source:
    """Draw a plain tensor or `Tokens`, which need no adapter."""
    n, width = draw.size(1, 9), draw.size(1, 6)
    x = draw.tensor(draw.batch, n, width)
    if draw.flag():
        return Source(nn.Identity(), x, {}, (n,))
    size = (n, draw.size(1, 4)) if draw.flag() else (n,)
    where = draw_positions(draw, len(size), size)
    content = draw.tensor(draw.batch, *size, width)
    tables = () if where is None else tuple(table.detach() for table in where.tables(size, like=content))
    return Source(nn.Identity(), Tokens(content, tables, draw.mask(*size)), {}, size)


def draw_source(draw: Draw, *, simple: bool = False) -> Source:
    """Draw an adapter with an input. A simple adapter has a single input and is not wrapped by another one."""
    if simple or draw.flag(0.65):
        return draw.choice(*SIMPLE)(draw)
    return draw.choice(dropped, multimodal, multimodal, per_read, plain)(draw)
