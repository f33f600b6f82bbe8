"""Perceiver Resampler: maps any number of image or video features to a fixed number of vectors.

Vision-language models use it to compress the features of a vision encoder to a few visual tokens. `Resampler` takes one
sequence of features per sample. `EachFrame` and `AllFrames` apply a resampler to the frames of a video.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import argument_types, checks
from perceiver_core.blocks import MLP, JointAttend, MultiHeadAttention, SquaredReLU
from perceiver_core.blocks.factory import build
from perceiver_core.kernels.reference import QueryIndices
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.positions import Positions
from perceiver_core.positions.grid import warn_if_padded
from perceiver_core.reads import AttentionCapture
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

FLAMINGO = partial(
    JointAttend,
    attention=partial(MultiHeadAttention, bias=False, out_bias=False),
    mlp=partial(MLP, widening_factor=4, activation=SquaredReLU(), bias=False),
)
"""Resampler layer of the Flamingo paper. Its linear layers have no biases, as in all published code."""


@register
class Resampler(nn.Module):
    """Perceiver Resampler: in each layer, latents attend jointly to the features and to each other.

        features = projection(features)
        for each layer:  latents = layer(latents, features)
        output = norm(latents)

    Args:
        input_dim: Width of the features.
        num_latents: Number of output vectors per sample.
        dim: Width of the output vectors; `input_dim` by default.
        depth: Number of layers, each with its own weights.
        num_heads: Number of attention heads per layer.
        projection: Factory `(input_dim, dim) -> module` for the projection of the features. By default a linear layer,
            or the identity if `dim` equals `input_dim`.
        block: Factory `(dim, num_heads=num_heads) -> module` for each layer. Use `functools.partial(JointAttend, ...)`
            to set options.
        norm: Factory `dim -> module` for the output norm.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> resampler = pc.Resampler(48, num_latents=8, dim=32, depth=2, num_heads=4)
        >>> resampler(torch.randn(2, 257, 48)).shape
        torch.Size([2, 8, 32])

    Reference: Alayrac et al. 2022 (Flamingo), section 2.1 and appendix A.1.1.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_latents: int = 64,
        dim: int | None = None,
        depth: int = 6,
        num_heads: int = 8,
        projection: Callable[[int, int], nn.Module] | None = None,
        block: Callable[..., nn.Module] = FLAMINGO,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        dim = input_dim if dim is None else dim
        checks.positive(input_dim=input_dim, num_latents=num_latents, dim=dim, num_heads=num_heads)
        checks.positive(at_most=10_000, depth=depth)
        if projection is None:
            projection = nn.Identity if dim == input_dim else init.linear
        self.input_dim, self.dim = input_dim, dim
        self.latents = init.embedding(num_latents, dim)
        self.projection = build("projection", projection, input_dim, dim)
        self.layers = nn.ModuleList(build("block", block, dim, num_heads=num_heads) for _ in range(depth))
        self.norm = build("norm", norm, dim)

    def forward(
        self,
        features: Tokens | Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents after all layers.

        Args:
            features: Features `b n c`, such as the output of a vision encoder; or `Tokens`, which have their own mask.
            mask: Mask of valid features, True = attend. Masked features are ignored, even if they are NaN. If all
                features of a sample are masked, its latents attend only to each other.
            capture: Container that stores the attention weights of the layer with index `capture.read` (default:
                the last).

        Raises:
            TypeError: If the features have the wrong dtype, or the mask is not boolean.
            ValueError: If the features have the wrong width, rank or device.
            ValueError: If the mask has the wrong shape, or is passed together with `Tokens`.
        """
        if isinstance(features, Tokens):
            if mask is not None:
                raise ValueError("mask must be None if features are Tokens, which have their own; build them with it")
            mask, features = features.flat_mask(), features.materialize()
        checks.is_floating("features", features)
        checks.has_shape("features", features, "b n c", last=self.input_dim)
        checks.matches_weight("features", features, self.projection)
        if mask is not None:
            checks.is_mask("mask", mask, features.shape[:-1])
            features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        features = apply_linear(self.projection, features)
        # Batch size 1 until the first layer. A copy, because hooks of FlopCounterMode fail on views of parameters.
        x = self.latents.unsqueeze(0).clone()
        captured = None if capture is None else argument_types.index("read", capture.read, len(self.layers))
        for number, layer in enumerate(self.layers):
            options = {"capture": capture} if number == captured else {}
            x = layer(x, features, mask=mask, **options)
        return self.norm(x)

    def attention_map(
        self,
        features: Tokens | Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        layer: int = -1,
        queries: QueryIndices = None,
    ) -> Float[Tensor, "b h chosen n_and_m"]:
        """Return the attention weights of one layer over the n features, followed by the m latents.

        Args:
            features: Same as in `forward`.
            mask: Same as in `forward`.
            layer: Index of the layer; negative indices count from the last.
            queries: Indices of the selected latents; None for all latents.

        Returns:
            Attention weights `b h chosen (n + m)`, where `chosen` is the number of selected latents.

        Raises:
            ValueError: If `layer` is out of range.
        """
        capture = AttentionCapture(argument_types.index("layer", layer, len(self.layers)), queries)
        self(features, mask=mask, capture=capture)
        return capture.result()


class _Frames(nn.Module):
    """Base class of modules that apply a resampler to video frames, with optional frame positions."""

    def __init__(self, resampler: nn.Module, *, frame_positions: Positions | None) -> None:
        super().__init__()
        if frame_positions is not None:
            if isinstance(frame_positions, type) or not isinstance(frame_positions, Positions):
                example = "positions.LearnedEmbedding(8, dim)"
                raise TypeError(f"frame_positions must be positions such as {example}; got {frame_positions!r}")
            width = getattr(resampler, "input_dim", frame_positions.dim)
            if frame_positions.num_axes != 1 or frame_positions.dim != width:
                raise ValueError(
                    f"frame_positions must have one axis and the width of the features, {width}, to which they are "
                    f"added; got {frame_positions.num_axes} axes, {frame_positions.dim} wide"
                )
        self.resampler, self.frame_positions = resampler, frame_positions
        self.input_dim, self.dim = getattr(resampler, "input_dim", None), getattr(resampler, "dim", None)

    def _resampled(self, features: Tensor, mask: Tensor | None, axes: str) -> Tensor:
        """Add frame positions, merge axes, and apply the resampler.

        `axes` is the einops pattern of the resampler's input: `(b t) n` to resample each frame separately, or `b (t n)`
        to resample all frames jointly.
        """
        positions = self.frame_positions
        checks.is_floating("features", features)
        checks.has_shape("features", features, "b t n c", last=None if positions is None else positions.dim)
        if mask is not None:
            checks.is_mask("mask", mask, features.shape[:-1])
            warn_if_padded(positions, mask.any(-1))
            mask = rearrange(mask, f"b t n -> {axes}")
        if positions is not None:
            tables = positions.tables((features.shape[1],), like=features)
            features = features + sum(tables[1:], start=tables[0]).unsqueeze(-2)
        return self.resampler(rearrange(features, f"b t n c -> {axes} c"), mask=mask)


@register
class EachFrame(_Frames):
    """Module that applies a resampler to each frame of a video separately.

        b t n c  --add frame positions-->  (b t) n c  --resampler-->  b t m d

    Args:
        resampler: Module that maps features `b n c` to vectors `b m d`, with a keyword argument `mask`; usually a
            `Resampler`.
        frame_positions: Positions along the time axis, such as `positions.LearnedEmbedding` or `positions.LearnedGrid`.
            All features of a frame get the same position. None for no positions.

    Raises:
        TypeError: If `frame_positions` does not implement `positions.Positions`.
        ValueError: If `frame_positions` does not have one axis and the width of the features.

    Example:
        >>> resampler = pc.Resampler(48, num_latents=8, depth=2, num_heads=4)
        >>> frames = pc.models.EachFrame(resampler, frame_positions=pc.positions.LearnedEmbedding(5, dim=48))
        >>> frames(torch.randn(2, 3, 257, 48)).shape
        torch.Size([2, 3, 8, 48])

    Reference: flamingo-pytorch, `PerceiverResampler`.
    """

    def __init__(self, resampler: nn.Module, *, frame_positions: Positions | None = None) -> None:
        super().__init__(resampler, frame_positions=frame_positions)

    def forward(
        self, features: Float[Tensor, "b t n c"], *, mask: Bool[Tensor, "b t n"] | None = None
    ) -> Float[Tensor, "b t m d"]:
        """Return the output of the resampler for each frame.

        Args:
            features: Features of each frame. With `positions.LearnedEmbedding`, the number of frames must not exceed
                the length of the embedding.
            mask: Mask of valid features, True = attend. With a `Resampler`, a frame may be fully masked.
        """
        resampled: Tensor = self._resampled(features, mask, "(b t) n")
        return torch.unflatten(resampled, 0, tuple(features.shape[:2]))


@register
class AllFrames(_Frames):
    """Module that applies a resampler to the features of all frames of a video at once, giving m vectors per video.

        b t n c  --add frame positions-->  b (t n) c  --resampler-->  b m d

    Args:
        resampler: Module that maps features `b n c` to vectors `b m d`, with a keyword argument `mask`; usually a
            `Resampler`.
        frame_positions: Same as in `EachFrame`, but required. The paper uses
            `positions.LearnedGrid((8,), dim)`, which is interpolated for other numbers of frames. open_flamingo uses
            `positions.LearnedEmbedding(max_frames, dim)`.

    Raises:
        TypeError, ValueError: Same as in `EachFrame`.

    Example:
        >>> resampler = pc.Resampler(48, num_latents=8, depth=2, num_heads=4)
        >>> video = pc.models.AllFrames(resampler, frame_positions=pc.positions.LearnedGrid((8,), dim=48))
        >>> video(torch.randn(2, 30, 17, 48)).shape
        torch.Size([2, 8, 48])

    Reference: Alayrac et al. 2022 (Flamingo), appendix A.1.1.
    """

    def forward(
        self, features: Float[Tensor, "b t n c"], *, mask: Bool[Tensor, "b t n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """Return the output of the resampler for each video. Pad shorter videos with masked frames at the end."""
        return self._resampled(features, mask, "b (t n)")
