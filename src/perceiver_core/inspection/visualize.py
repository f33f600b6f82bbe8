"""Attention maps, and plots of position features and model architectures.

Overlays and plots require matplotlib: `pip install "perceiver-core[plots]"`. Plots are `matplotlib.figure.Figure`
objects that are not attached to a window. To save a plot, call `figure.savefig("plot.png")`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.argument_errors import checked, explained
from perceiver_core.encoder import Encoder
from perceiver_core.models import Perceiver, PerceiverIO
from perceiver_core.positions import Positions
from perceiver_core.reads import AttentionCapture
from perceiver_core.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colorblind-safe color cycle (Okabe and Ito), one color per set of weights.
_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")


@torch.no_grad()
@checked
def attention_map(
    model: Perceiver,
    inputs: object,
    *,
    read: int = -1,
    queries: int | Sequence[int] | Tensor | None = None,
    mask: object = None,
) -> Float[Tensor, "b h chosen *grid"]:
    """Return the attention weights of selected latents in one read (cross-attention), reshaped to the token grid.

    The model runs in evaluation mode and without gradients. Its training mode is restored afterwards.

    Args:
        model: Perceiver.
        inputs: Input of the model, such as images `b c h w`.
        read: Index of the read in the encoder (default: -1, the last).
        queries: Indices of the selected latents; None for all latents.
        mask: Mask of valid inputs, passed to `Perceiver.forward`; None for no mask.

    Returns:
        Attention weights `b h chosen *grid`, where `chosen` is the number of selected latents. They sum to 1 over the
        grid. If the encoder's input is a tensor `b n c` instead of `Tokens`, the shape is `b h chosen n`.

    Example:
        >>> where = pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=16)
        >>> image = pc.adapters.Image(num_channels=3, positions=where)
        >>> encoder = pc.Encoder(image.dim, num_latents=6, dim=16, depth=1, num_heads=2)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Classification(16, num_classes=3))
        >>> pc.visualize.attention_map(model, torch.rand(2, 3, 13, 17), queries=[0, 5]).shape
        torch.Size([2, 1, 2, 13, 17])
    """
    capture = AttentionCapture(read, queries)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(inputs, capture=capture, **({} if mask is None else {"mask": mask}))
    finally:
        for module, training in modes.items():
            module.training = training
    weights = capture.result()
    return weights if capture.grid is None else weights.reshape(*weights.shape[:-1], *capture.grid)


@explained
def overlay(
    image: Float[Tensor, "c h w"], weights: Float[Tensor, "rows columns"], *, strength: float = 0.6
) -> UInt8[np.ndarray, "h w 3"]:
    """Overlay an attention map on an image, as a heat map that is bright where the weights are large.

    Args:
        image: Image with 1 or 3 channels. Its values are rescaled to [0, 1].
        weights: Attention map of any size. It is interpolated to the image size, and its values are rescaled to [0, 1].
        strength: Opacity of the attention map, in [0, 1].

    Returns:
        RGB image `h w 3`.

    Raises:
        ValueError: If the image does not have 1 or 3 channels, or the map is not 2-D.
        ValueError: If `strength` is outside [0, 1].

    Example:
        >>> pc.visualize.overlay(torch.rand(1, 60, 44), torch.rand(15, 11)).shape
        (60, 44, 3)
    """
    checks.is_real("image", image)
    checks.is_real("weights", weights)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be c h w with 1 or 3 channels; got shape {tuple(image.shape)}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1]; got {strength}")
    checks.has_shape("weights", weights, "rows columns")
    resized = F.interpolate(weights.detach().float().cpu()[None, None], image.shape[1:], mode="bilinear")[0, 0]
    heat = _matplotlib().colormaps["inferno"](_stretched(resized).numpy())[..., :3]
    base = _stretched(image.detach().float().cpu()).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return (((1 - strength) * base + strength * heat) * 255).round().astype(np.uint8)


@checked
def position_features(positions: Positions, grid: Sequence[int], *, columns: int = 8, limit: int = 64) -> Figure:
    """Plot position features as one image per feature (2-D grid), or as a single image of all features (1-D grid).

    Args:
        positions: Position encoding of a one- or two-dimensional grid.
        grid: Grid size, one number per axis.
        columns: Number of images per row of the figure.
        limit: Maximum number of features to plot. If there are more, evenly spaced features are selected.

    Raises:
        ValueError: If the grid does not have one or two axes.

    Example:
        >>> where = pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=32)
        >>> figure = pc.visualize.position_features(where, (24, 32))
        >>> len(figure.axes)
        18
    """
    if len(grid) not in (1, 2):
        raise ValueError(f"grid must have one or two axes; got {tuple(grid)}")
    checks.positive(columns=columns, limit=limit)
    tokens = Tokens(torch.zeros(1, *grid, 1), positions.tables(grid, like=torch.zeros(())))
    values = cast(Tensor, tokens.positions()).detach().numpy()
    selected = np.linspace(0, positions.dim - 1, min(limit, positions.dim)).round().astype(int)
    if len(grid) == 1:
        figure = _figure(8, 4)
        axes = figure.subplots()
        axes.imshow(values[:, selected].T, aspect="auto", cmap="RdBu", interpolation="nearest")
        axes.set(xlabel="position", ylabel="feature", title=repr(positions))
        return figure
    rows = -(-len(selected) // columns)
    figure = _figure(1.3 * columns, 1.5 * rows * grid[0] / grid[1] + 0.2)
    for index, feature in enumerate(selected, start=1):
        axes = figure.add_subplot(rows, columns, index)
        axes.imshow(values[..., feature], cmap="RdBu", interpolation="nearest")
        axes.set_title(str(feature), fontsize=7, pad=2)
        axes.set_axis_off()
    return figure


@explained
def architecture(model: Perceiver | PerceiverIO) -> Figure:
    """Draw the reads (cross-attentions) and latent transformers of a Perceiver in execution order.

    Modules that share weights have the same color. For a `PerceiverIO`, the queries and the decoder are drawn as well.

    Raises:
        TypeError: If `model.encoder` is not an `Encoder`.

    Example:
        >>> with torch.device("meta"):
        ...     model = pc.models.presets.modelnet40()
        >>> float(pc.visualize.architecture(model).get_figwidth()) > 5
        True
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, Encoder):
        raise TypeError(f"model must be a Perceiver or PerceiverIO, with an Encoder; got {type(model).__name__}")
    steps = encoder.sharing.steps
    width = 2.8 + 1.9 * steps + 1.5 * isinstance(model, PerceiverIO)
    figure = _figure(width, 3.2)
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, 3.2))
    axes.set_axis_off()
    _box(axes, (0.1, 1.75, 1.0, 0.9), f"latents\n{encoder.latents.shape[0]} \u00d7 {encoder.dim}", "#DDDDDD")
    input_widths = " / ".join(dict.fromkeys(str(encoder.reads[read].input_dim) for read in encoder.sharing.reads))
    label = f"input array, n \u00d7 {input_widths}  ({type(model.adapter).__name__})"
    _box(axes, (1.2, 0.15, 1.9 * steps, 0.6), label, "#DDDDDD")
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
    if isinstance(model, PerceiverIO):
        _box(axes, (end, 0.15, 1.2, 0.6), f"queries\n{type(model.queries).__name__}", "#DDDDDD")
        _arrow(axes, (end + 0.6, 0.75), (end + 0.6, 1.75))
        _box(axes, (end, 1.75, 1.2, 0.9), f"decoder\n{type(model.decoder).__name__}", _COLORS[-1])
        _arrow(axes, (end + 1.2, 2.2), (end + 1.5, 2.2))
        end += 1.5
    _box(axes, (end, 1.75, 1.0, 0.9), f"head\n{type(model.head).__name__}", "#DDDDDD")
    _arrow(axes, (end + 1.0, 2.2), (end + 1.3, 2.2))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    axes.text(0.1, 2.95, f"{millions:.1f} million parameters; the same color is the same weights", fontsize=9)
    return figure


def _box(axes: Axes, bounds: tuple[float, float, float, float], text: str, color: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = bounds
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="#333333")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#333333"})


def _figure(width: float, height: float) -> Figure:
    _matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "perceiver-core[plots]"') from error
    return matplotlib


def _stretched(x: Tensor) -> Tensor:
    """Rescale `x` so that its minimum becomes 0 and its maximum becomes 1. A constant tensor becomes all zeros."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
