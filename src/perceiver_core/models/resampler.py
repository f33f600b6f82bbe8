"""Perceiver Resampler: any number of features of an image or a video becomes a fixed number of vectors.

A vision-language model uses it to turn the features of a vision encoder into a few visual tokens. `Resampler` takes one
array of features per sample; `EachFrame` and `AllFrames` apply it to the frames of a video.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.blocks import MLP, JointAttend, MultiHeadAttention, SquaredReLU
from perceiver_core.blocks.factory import build
from perceiver_core.layers import init
from perceiver_core.positions import Positions
from perceiver_core.reads import AttentionCapture
from perceiver_core.reads.strategy import QueryIndices
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

FLAMINGO = partial(
    JointAttend,
    attention=partial(MultiHeadAttention, bias=False, out_bias=False),
    mlp=partial(MLP, widening_factor=4, activation=SquaredReLU(), bias=False),
)
"""Layer of the paper, without biases as in all published code."""


@register
class Resampler(nn.Module):
    """Latents that attend, in each layer, to the features and to each other in one softmax.

        features = projection(features)
        for each layer:  latents = layer(latents, features)
        output = norm(latents)

    Args:
        input_dim: Width of the features.
        num_latents: Number of output vectors per sample.
        dim: Width of the output vectors; `input_dim` by default.
        depth: Number of layers, each with its own weights.
        num_heads: Number of attention heads per layer.
        projection: Factory `(input_dim, dim) -> module` applied to the features; by default a linear layer, or none if
            `dim` equals `input_dim`.
        block: Factory `(dim, num_heads=num_heads) -> module` of a layer; `functools.partial` of `JointAttend` sets the
            rest.
        norm: Factory `dim -> module` of the norm of the output.

    Raises:
        ValueError: Sizes below 1.

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
        self.projection = build(projection, input_dim, dim)
        self.layers = nn.ModuleList(build(block, dim, num_heads=num_heads) for _ in range(depth))
        self.norm = build(norm, dim)

    def forward(
        self,
        features: Tokens | Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents after all layers.

        Args:
            features: Features, for example of a vision encoder; or `Tokens`, with their own mask.
            mask: Valid features. The content of others has no effect, NaN included. In a sample without valid features
                the latents attend to each other only.
            capture: Receives the attention weights of one layer.

        Raises:
            TypeError, ValueError: Features of another width, rank, dtype or device; an invalid mask.
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
        features = self.projection(features)
        x = self.latents.unsqueeze(0)  # a batch of 1 until the first layer
        captured = None if capture is None else range(len(self.layers))[capture.read]
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
        """Return the attention weights of one layer on each feature and, after these, on each latent.

        Args:
            features: As in `forward`.
            mask: As in `forward`.
            layer: Index of the layer; negative indices count from the last.
            queries: Indices of the latents whose weights are returned; all of them by default.

        Raises:
            ValueError: An index out of range.
        """
        depth = len(self.layers)
        if not -depth <= layer < depth:
            raise ValueError(f"layer must lie in {-depth} ... {depth - 1}; got {layer}")
        capture = AttentionCapture(layer, queries)
        self(features, mask=mask, capture=capture)
        return capture.result()


class _Frames(nn.Module):
    """Resampler applied to frames to which frame positions are added; subclasses choose how frames are joined."""

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
        """Return the output of the resampler for features and mask rearranged from `b t n` to `axes`."""
        positions = self.frame_positions
        checks.is_floating("features", features)
        checks.has_shape("features", features, "b t n c", last=None if positions is None else positions.dim)
        if mask is not None:
            checks.is_mask("mask", mask, features.shape[:-1])
            mask = rearrange(mask, f"b t n -> {axes}")
        if positions is not None:
            tables = positions.tables((features.shape[1],), like=features)
            features = features + sum(tables[1:], start=tables[0]).unsqueeze(-2)
        return self.resampler(rearrange(features, f"b t n c -> {axes} c"), mask=mask)


@register
class EachFrame(_Frames):
    """Resampler applied to each frame of a video separately.

        b t n c  --add frame positions-->  (b t) n c  --resampler-->  b t m d

    Args:
        resampler: Module from the features of a frame to its vectors.
        frame_positions: Positions along one axis that are added to the features of each frame, such as
            `positions.LearnedEmbedding` or `positions.LearnedGrid`; None for no positions.

    Raises:
        TypeError, ValueError: Frame positions that are not positions of one axis and of the features' width.

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
        """Return the vectors of every frame.

        Args:
            features: Features of the frames, of which `positions.LearnedEmbedding` limits the number.
            mask: Valid features; as in `Resampler`, a frame may have none.
        """
        return rearrange(self._resampled(features, mask, "(b t) n"), "(b t) m d -> b t m d", b=features.shape[0])


@register
class AllFrames(_Frames):
    """Resampler applied to all frames of a video together: the number of vectors is that of an image.

        b t n c  --add frame positions-->  b (t n) c  --resampler-->  b m d

    Args:
        resampler: Module from the features of all frames to the vectors of the video.
        frame_positions: As in `EachFrame`, but required. In the paper `positions.LearnedGrid((8,), dim)`, which are
            interpolated to other numbers of frames; in open_flamingo `positions.LearnedEmbedding(max_frames, dim)`.

    Raises:
        TypeError, ValueError: As in `EachFrame`.

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
        """Return the vectors of every video; a shorter video has masked frames at its end."""
        return self._resampled(features, mask, "b (t n)")
