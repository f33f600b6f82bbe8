"""The Perceiver Resampler: however many features an image or a video has, a fixed number of vectors of them.

A vision-language model reads pictures through it: features of a vision encoder come in, a few visual tokens go out.
`Resampler` takes one array of features a sample; `EachFrame` and `AllFrames` lay the frames of a video before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.blocks import MLP, JointAttend, MultiHeadAttention, SquaredReLU
from perceiver_core.positions import Positions
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

        features = project(features)
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
        block: makes a layer from (dim, heads=heads); `functools.partial` of `JointAttend` sets the rest.
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
        self.projection = projection(input_dim, dim)
        self.layers = nn.ModuleList(block(dim, num_heads=num_heads) for _ in range(depth))
        self.norm = norm(dim)

    def forward(
        self, features: Tokens | Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """The latents after all layers.

        Args:
            features: of a vision encoder, say; or tokens, whose own mask is the one that counts.
            mask: which features are there. What others hold has no effect, NaN included. Where none is there the
                latents have themselves.

        Raises:
            TypeError: features of another dtype, a mask that is not boolean.
            ValueError: features of another width, rank or device, a mask of another shape.
        """
        features, mask = self._given(features, mask)
        x = self.latents.unsqueeze(0)  # the same for all samples until they have read
        for layer in self.layers:
            x = layer(x, features, mask=mask)
        return self.norm(x)

    def attention_map(
        self,
        features: Tokens | Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        layer: int = -1,
        queries: Any = None,
    ) -> Float[Tensor, "b h chosen n_and_m"]:
        """How much chosen latents attend, in one layer, to each feature and, after these, to each latent.

        Args:
            features: as in `forward`.
            mask: as in `forward`.
            layer: which layer, from 0; negative numbers count from the last.
            queries: which latents, by index; all of them unless given.

        Raises:
            ValueError: a layer that there is not.
        """
        depth = len(self.layers)
        if not -depth <= layer < depth:
            raise ValueError(f"layer must lie in {-depth} ... {depth - 1}; got {layer}")
        features, mask = self._given(features, mask)
        x = self.latents.unsqueeze(0)
        for earlier in self.layers[: layer % depth]:
            x = earlier(x, features, mask=mask)
        weights: Tensor = self.layers[layer].attention_map(  # type: ignore[operator]
            x, features, mask=mask, queries=queries
        )
        return weights

    def _given(self, features: Tokens | Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features at the width of the latents, and which of them are there."""
        if isinstance(features, Tokens):
            if mask is not None:
                raise ValueError("mask must be that of the tokens where these are Tokens; make them with it")
            mask, features = features.flat_mask(), features.materialize()
        checks.is_floating("features", features)
        checks.has_shape("features", features, "b n c", last=self.input_dim)
        checks.same_place("features", features, self.latents)
        if mask is not None:
            checks.is_mask("mask", mask, features.shape[:-1])
            features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.projection(features), mask


@register
class EachFrame(nn.Module):
    """Frames by themselves: each becomes so many vectors as an image does.

        b t n c  --add times-->  (b t) n c  --each-->  b t m d

    Args:
        resampler: what reads the features of a frame.
        frame_positions: positions along one axis that are added to the features of each frame;
            `positions.LearnedEmbedding` or `positions.LearnedGrid`. None for frames that do not know when they are.

    Raises:
        TypeError, ValueError: times that are not positions of one axis and of the features' width.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from perceiver_core.models import EachFrame
        >>> frames = EachFrame(pc.Resampler(48, num_latents=8, depth=2, num_heads=4), frame_positions=pc.positions.LearnedEmbedding(5, dim=48))
        >>> frames(torch.randn(2, 3, 257, 48)).shape
        torch.Size([2, 3, 8, 48])

    Reference: flamingo-pytorch, `PerceiverResampler`.
    """

    def __init__(self, resampler: nn.Module, *, frame_positions: Positions | None = None) -> None:
        super().__init__()
        _check_times(frame_positions, resampler)
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
            TypeError, ValueError: what the resampler does not take; more frames than there are times.
        """
        features = _at_their_times(features, mask, self.frame_positions)
        flat = None if mask is None else rearrange(mask, "b t n -> (b t) n")
        out: Tensor = self.resampler(rearrange(features, "b t n c -> (b t) n c"), mask=flat)
        return rearrange(out, "(b t) m d -> b t m d", b=features.shape[0])


@register
class AllFrames(nn.Module):
    """All frames at once: a video becomes so many vectors as an image does.

        b t n c  --add times-->  b (t n) c  --resampler-->  b m d

    Args:
        resampler: what reads the features of all frames.
        frame_positions: as those of `EachFrame`. The paper's are `positions.LearnedGrid((8,), dim)`, which are
            interpolated for another number of frames; open_flamingo's are `positions.LearnedEmbedding(most, dim)`.

    Raises:
        TypeError, ValueError: times that are not positions of one axis and of the features' width.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from perceiver_core.models import AllFrames
        >>> video = AllFrames(pc.Resampler(48, num_latents=8, depth=2, num_heads=4), frame_positions=pc.positions.LearnedGrid((8,), dim=48))
        >>> video(torch.randn(2, 30, 17, 48)).shape
        torch.Size([2, 8, 48])

    Reference: Alayrac et al. 2022 (Flamingo), appendix A.1.1.
    """

    def __init__(self, resampler: nn.Module, *, frame_positions: Positions | None) -> None:
        super().__init__()
        _check_times(frame_positions, resampler)
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
            TypeError, ValueError: what the resampler does not take; more frames than there are times.
        """
        features = _at_their_times(features, mask, self.frame_positions)
        flat = None if mask is None else rearrange(mask, "b t n -> b (t n)")
        out: Tensor = self.resampler(rearrange(features, "b t n c -> b (t n) c"), mask=flat)
        return out


def _check_times(times: Positions | None, resampler: nn.Module) -> None:
    if times is None:
        return
    if isinstance(times, type) or not isinstance(times, Positions):
        raise TypeError(f"times must be positions such as positions.LearnedEmbedding(8, dim); got {times!r}")
    width = getattr(resampler, "input_dim", times.dim)
    if times.num_axes != 1 or times.dim != width:
        raise ValueError(
            f"times must have one axis and the width of the features, {width}, to which they are added; "
            f"got {times.num_axes} axes, {times.dim} wide"
        )


def _at_their_times(features: Tensor, mask: Tensor | None, times: Positions | None) -> Tensor:
    """Features with the position of their frame added."""
    checks.is_floating("features", features)
    width = None if times is None else times.dim
    checks.has_shape("features", features, "b t n c", last=width)
    if mask is not None:
        checks.is_mask("mask", mask, features.shape[:-1])
    if times is None:
        return features
    tables = times.tables((features.shape[1],), like=features)
    return features + sum(tables[1:], start=tables[0]).unsqueeze(-2)
