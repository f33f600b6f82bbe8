"""Pictures: what a model looked at, what position features look like, how a model is put together.

Pictures need matplotlib: `pip install "perceiver-core[plots]"`. Figures are plain `matplotlib.figure.Figure`
objects, tied to no window: `figure.savefig("map.png")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.models import Perceiver
from perceiver_core.positions import Positions
from perceiver_core.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colorblind-safe cycle (Okabe and Ito): one color for each set of weights.
_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")


@torch.no_grad()
def attention_map(
    model: Perceiver,
    inputs: Any,
    *,
    read: int = -1,
    queries: int | Sequence[int] | Tensor | None = None,
    mask: Any = None,
) -> Float[Tensor, "b h chosen *grid"]:
    """How much chosen latents attend to each token, laid out on the input's own grid.

    Dropout is off while the map is taken; the model's training mode is left as it was.

    Args:
        model: a Perceiver.
        inputs: what the model takes.
        read: which of the encoder's reads; the last unless given.
        queries: which latents, by index; all of them unless given.
        mask: as the model takes it.

    Returns:
        Weights that add to 1 over the grid.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> image = pc.adapters.Image(num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=16))
        >>> encoder = pc.Encoder(image.dim, num_latents=6, dim=16, depth=1, num_heads=2)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Classification(16, num_classes=3))
        >>> pc.visualize.attention_map(model, torch.rand(2, 3, 13, 17), queries=[0, 5]).shape
        torch.Size([2, 1, 2, 13, 17])
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        tokens = model.adapter(inputs) if mask is None else model.adapter(inputs, mask=mask)
        weights: Tensor = model.encoder.attention_map(tokens, read=read, queries=queries)  # type: ignore[operator]
    finally:
        for module, training in modes.items():
            module.training = training
    seen = tokens[read] if isinstance(tokens, (list, tuple)) else tokens
    if not isinstance(seen, Tokens):
        return weights
    return weights.reshape(*weights.shape[:-1], *seen.grid)


def overlay(
    picture: Float[Tensor, "c h w"], weights: Float[Tensor, "rows columns"], *, strength: float = 0.6
) -> UInt8[np.ndarray, "h w 3"]:
    """A map laid over the picture it belongs to: bright where the model looked.

    Args:
        picture: grey or color, on any scale; stretched to its own range.
        weights: a map of any size; smoothed up to the picture's, stretched to its own range.
        strength: in [0, 1], how much of the map is seen.

    Raises:
        ValueError: a picture that is not grey or color, a map that is not two-dimensional, a strength out of range.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> pc.visualize.overlay(torch.rand(1, 60, 44), torch.rand(15, 11)).shape
        (60, 44, 3)
    """
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"picture must be c h w with 1 or 3 channels; got shape {tuple(picture.shape)}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1]; got {strength}")
    checks.has_shape("weights", weights, "rows columns")
    height, width = picture.shape[1:]
    grown = F.interpolate(weights.detach().float().cpu()[None, None], (height, width), mode="bilinear")[0, 0]
    heat = _colored(_stretched(grown).numpy(), "inferno")
    base = _stretched(picture.detach().float().cpu()).expand(3, -1, -1).permute(1, 2, 0).numpy()
    mixed = (1 - strength) * base + strength * heat
    return (mixed * 255).round().astype(np.uint8)


def position_features(positions: Positions, grid: Sequence[int], *, columns: int = 8, limit: int = 64) -> Figure:
    """The features of a grid's points as pictures, one a feature (for one axis: all of them in one).

    Args:
        positions: any positions over one or two axes.
        grid: the size of each axis.
        columns: pictures in a row.
        limit: how many features to show, evenly chosen.

    Raises:
        ValueError: a grid of other than one or two axes.

    Example:
        >>> import perceiver_core as pc
        >>> figure = pc.visualize.position_features(pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=32), (24, 32))
        >>> len(figure.axes)
        18
    """
    if len(grid) not in (1, 2):
        raise ValueError(f"grid must have one or two axes; got {tuple(grid)}")
    tables = positions.tables(grid, like=torch.zeros(()))
    tokens = Tokens(torch.zeros(1, *grid, 1), tables)
    features = tokens.positions()
    assert features is not None
    values = features.detach().numpy()
    chosen = np.linspace(0, positions.dim - 1, min(limit, positions.dim)).round().astype(int)
    if len(grid) == 1:
        figure = _figure(8, 4)
        axes = figure.subplots()
        axes.imshow(values[:, chosen].T, aspect="auto", cmap="RdBu", interpolation="nearest")
        axes.set(xlabel="position", ylabel="feature", title=repr(positions))
        return figure
    rows = -(-len(chosen) // columns)
    figure = _figure(1.3 * columns, 1.5 * rows * grid[0] / grid[1] + 0.2)
    for place, feature in enumerate(chosen, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(values[..., feature], cmap="RdBu", interpolation="nearest")
        axes.set_title(str(feature), fontsize=7, pad=2)
        axes.set_axis_off()
    return figure


def architecture(model: Perceiver) -> Figure:
    """A drawing of a Perceiver: its reads and latent transformers in order, one color for each set of weights.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> with torch.device("meta"):
        ...     model = pc.models.presets.modelnet40()
        >>> float(pc.visualize.architecture(model).get_figwidth()) > 5
        True
    """
    encoder: Any = model.encoder
    steps, dim = encoder.sharing.steps, encoder.dim
    figure = _figure(2.8 + 1.9 * steps, 3.2)
    axes = figure.subplots()
    axes.set(xlim=(0, 2.8 + 1.9 * steps), ylim=(0, 3.2))
    axes.set_axis_off()
    _box(axes, (0.1, 1.75, 1.0, 0.9), f"latents\n{encoder.latents.shape[0]} \u00d7 {dim}", "#DDDDDD")
    widths = [encoder.reads[number].input_dim for number in encoder.sharing.reads]
    _box(axes, (1.2, 0.15, 1.9 * steps, 0.6), _input_label(model, widths), "#DDDDDD")
    for step, (read, transformer) in enumerate(zip(encoder.sharing.reads, encoder.sharing.transformers, strict=True)):
        left = 1.35 + 1.9 * step
        depth = len(getattr(encoder.transformers[transformer], "blocks", ()))
        _arrow(axes, (left - 0.27, 2.2), (left, 2.2))
        _arrow(axes, (left + 0.35, 0.75), (left + 0.35, 1.75))
        _box(axes, (left, 1.75, 0.7, 0.9), f"read\n{read + 1}", _COLORS[read % len(_COLORS)])
        _arrow(axes, (left + 0.7, 2.2), (left + 0.83, 2.2))
        color = _COLORS[(transformer + 2) % len(_COLORS)]
        _box(axes, (left + 0.83, 1.75, 0.8, 0.9), f"latent\ntransf. {transformer + 1}\n\u00d7 {depth}", color)
    end = 1.35 + 1.9 * steps
    _arrow(axes, (end - 0.27, 2.2), (end, 2.2))
    _box(axes, (end, 1.75, 1.0, 0.9), f"head\n{type(model.head).__name__}", "#DDDDDD")
    _arrow(axes, (end + 1.0, 2.2), (end + 1.3, 2.2))
    count = sum(parameter.numel() for parameter in model.parameters())
    axes.text(0.1, 2.95, f"{count / 1e6:.1f} million parameters; the same color is the same weights", fontsize=9)
    return figure


def _input_label(model: nn.Module, widths: Sequence[int]) -> str:
    adapter = type(model.adapter).__name__
    width = " / ".join(str(w) for w in dict.fromkeys(widths))
    return f"input array, n \u00d7 {width}  ({adapter})"


def _box(axes: Any, place: tuple[float, float, float, float], text: str, color: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="#333333")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#333333"})


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "perceiver-core[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _colored(values: Float[np.ndarray, "h w"], name: str) -> Float[np.ndarray, "h w 3"]:
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "perceiver-core[plots]"') from error
    return np.asarray(colormaps[name](values))[..., :3]


def _stretched(x: Tensor) -> Tensor:
    """To [0, 1] over its own range; a constant becomes 0."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
