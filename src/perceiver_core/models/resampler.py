"""The Perceiver Resampler: however many features an image or a video has, a fixed number of vectors of them.

A vision-language model reads pictures through it: features of a vision encoder come in, a few visual tokens go out.
`Resampler` takes one array of features a sample; `EachFrame` and `AllFrames` lay the frames of a video before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.blocks import MLP, JointAttend, MultiHeadAttention, SquaredReLU
from perceiver_core.blocks.factory import build
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
"""The paper's layer; without biases, as all published code has it."""


@register
class Resampler(nn.Module):
    """Latents read the features and each other in one softmax, `depth` times over.

        features = projection(features)
        for each layer:  latents = layer(latents, [features, latents])
        answer = norm(latents)

    Args:
        input_dim: the width of the features.
        num_latents: how many vectors a sample becomes.
        dim: their width; `input_dim` unless given.
        depth: how many layers, each with its own weights.
        num_heads: attention heads of a layer.
        projection: makes what brings features to the width of the latents, from (input_dim, dim); a linear layer where
            these differ, and nothing where they do not, unless given.
        block: makes a layer from (dim, num_heads=num_heads); `functools.partial` of `JointAttend` sets the rest.
        norm: makes the norm of what comes out, from its width.

    Raises:
        ValueError: sizes below 1.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
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
            mask: Valid features. The values of the others have no effect, NaN included. In a sample without valid
                features the latents attend to each other only.
            capture: Receives the attention weights of one layer.

        Raises:
            TypeError: Features of another dtype, a mask that is not boolean.
            ValueError: Features of another width, rank or device, a mask of another shape.
        """
        features, mask = self._project(features, mask)
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

    def _project(self, features: Tokens | Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return features as wide as the latents, and their mask."""
        if isinstance(features, Tokens):
            if mask is not None:
                raise ValueError("mask must be that of the tokens where these are Tokens; make them with it")
            mask, features = features.flat_mask(), features.materialize()
        checks.is_floating("features", features)
        checks.has_shape("features", features, "b n c", last=self.input_dim)
        checks.matches_weight("features", features, self.projection)
        if mask is not None:
            checks.is_mask("mask", mask, features.shape[:-1])
            features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.projection(features), mask


@register
class EachFrame(nn.Module):
    """Frames by themselves: each becomes so many vectors as an image does.

        b t n c  --add frame positions-->  (b t) n c  --each-->  b t m d

    Args:
        resampler: what reads the features of a frame.
        frame_positions: positions along one axis that are added to the features of each frame;
            `positions.LearnedEmbedding` or `positions.LearnedGrid`. None for frames that do not know when they are.

    Raises:
        TypeError, ValueError: frame positions that are not positions of one axis and of the features' width.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from perceiver_core.models import EachFrame
        >>> resampler = pc.Resampler(48, num_latents=8, depth=2, num_heads=4)
        >>> frames = EachFrame(resampler, frame_positions=pc.positions.LearnedEmbedding(5, dim=48))
        >>> frames(torch.randn(2, 3, 257, 48)).shape
        torch.Size([2, 3, 8, 48])

    Reference: flamingo-pytorch, `PerceiverResampler`.
    """

    def __init__(self, resampler: nn.Module, *, frame_positions: Positions | None = None) -> None:
        super().__init__()
        _check_frame_positions(frame_positions, resampler)
        self.resampler, self.frame_positions = resampler, frame_positions
        self.input_dim, self.dim = getattr(resampler, "input_dim", None), getattr(resampler, "dim", None)

    def forward(
        self, features: Float[Tensor, "b t n c"], *, mask: Bool[Tensor, "b t n"] | None = None
    ) -> Float[Tensor, "b t m d"]:
        """The latents of every frame.

        Args:
            features: of frames.
            mask: which of them are there; a frame without any is read as one of no features.

        Raises:
            TypeError, ValueError: what the resampler does not take; more frames than there are frame positions.
        """
        features = _with_frame_positions(features, mask, self.frame_positions)
        flat = None if mask is None else rearrange(mask, "b t n -> (b t) n")
        out: Tensor = self.resampler(rearrange(features, "b t n c -> (b t) n c"), mask=flat)
        return rearrange(out, "(b t) m d -> b t m d", b=features.shape[0])


@register
class AllFrames(nn.Module):
    """All frames at once: a video becomes so many vectors as an image does.

        b t n c  --add frame positions-->  b (t n) c  --resampler-->  b m d

    Args:
        resampler: what reads the features of all frames.
        frame_positions: as those of `EachFrame`. The paper's are `positions.LearnedGrid((8,), dim)`, which are
            interpolated for another number of frames; open_flamingo's are `positions.LearnedEmbedding(most, dim)`.

    Raises:
        TypeError, ValueError: frame positions that are not positions of one axis and of the features' width.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from perceiver_core.models import AllFrames
        >>> resampler = pc.Resampler(48, num_latents=8, depth=2, num_heads=4)
        >>> video = AllFrames(resampler, frame_positions=pc.positions.LearnedGrid((8,), dim=48))
        >>> video(torch.randn(2, 30, 17, 48)).shape
        torch.Size([2, 8, 48])

    Reference: Alayrac et al. 2022 (Flamingo), appendix A.1.1.
    """

    def __init__(self, resampler: nn.Module, *, frame_positions: Positions | None) -> None:
        super().__init__()
        _check_frame_positions(frame_positions, resampler)
        self.resampler, self.frame_positions = resampler, frame_positions
        self.input_dim, self.dim = getattr(resampler, "input_dim", None), getattr(resampler, "dim", None)

    def forward(
        self, features: Float[Tensor, "b t n c"], *, mask: Bool[Tensor, "b t n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """The latents of every video.

        Args:
            features: of frames.
            mask: which of them are there; of a shorter video, say, the frames behind its end are not.

        Raises:
            TypeError, ValueError: what the resampler does not take; more frames than there are frame positions.
        """
        features = _with_frame_positions(features, mask, self.frame_positions)
        flat = None if mask is None else rearrange(mask, "b t n -> b (t n)")
        out: Tensor = self.resampler(rearrange(features, "b t n c -> b (t n) c"), mask=flat)
        return out


def _check_frame_positions(frame_positions: Positions | None, resampler: nn.Module) -> None:
    if frame_positions is None:
        return
    if isinstance(frame_positions, type) or not isinstance(frame_positions, Positions):
        raise TypeError(
            f"frame_positions must be positions such as positions.LearnedEmbedding(8, dim); got {frame_positions!r}"
        )
    width = getattr(resampler, "input_dim", frame_positions.dim)
    if frame_positions.num_axes != 1 or frame_positions.dim != width:
        raise ValueError(
            f"frame_positions must have one axis and the width of the features, {width}, to which they are added; "
            f"got {frame_positions.num_axes} axes, {frame_positions.dim} wide"
        )


def _with_frame_positions(features: Tensor, mask: Tensor | None, frame_positions: Positions | None) -> Tensor:
    """Features with the position of their frame added."""
    checks.is_floating("features", features)
    width = None if frame_positions is None else frame_positions.dim
    checks.has_shape("features", features, "b t n c", last=width)
    if mask is not None:
        checks.is_mask("mask", mask, features.shape[:-1])
    if frame_positions is None:
        return features
    tables = frame_positions.tables((features.shape[1],), like=features)
    return features + sum(tables[1:], start=tables[0]).unsqueeze(-2)
