"""The Hierarchical Perceiver: groups of the input are read by latents of their own, and merge from level to level.

    tokens --16 groups--> 16 x z latents --4 groups--> 4 x z latents --1 group--> z latents      encode
    latents --4 groups--> 4 x z latents --16 groups--> 16 x z latents                            decode

Who is in a group attends to nobody outside, so a read costs as many times less as there are groups, and a long input
meets many latents. Groups are stretches of the input as it comes, flattened: what is near in it should belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.blocks import CrossAttend, GroupedRead, Level
from perceiver_core.blocks.grouped_read import LATENT_TRANSFORMER, grouped
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class HierarchicalPerceiver(nn.Module):
    """Levels of grouped reads that merge groups, and levels that split them again.

        x = embed(inputs) + positions
        for each level:         x = latents of the groups of x
        for each decode level:  x = latents of the groups of x, to which those of the level opposite are added first

    An encoder as others are: it goes between an adapter and a head. The decode levels are for answers as large as the
    input; see `HierarchicalAutoencoder`.

    Args:
        input_dim: the width of the input's tokens.
        levels: the sizes of each level. The paper's groups become fewer, as 16, 4, 1.
        positions: position features that are added to the embedded input, whose width is theirs; the paper's are
            learned and low-dimensional: `positions.LearnedGrid((n,), dim=32)`.
        decode: the sizes of the levels after these. The first is opposite the last level but one, and so on back to
            the first, each with as many groups and latents as the level opposite.
        cross_attention: makes the cross-attend of a level from (dim, input_dim).
        latent_transformer: makes its latent transformer from (dim, depth=depth, heads=heads).

    Raises:
        TypeError: positions that are none.
        ValueError: no level; decode levels of other sizes than their opposites.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> levels = [pc.Level(16, num_latents=4, dim=32), pc.Level(4, num_latents=8, dim=48), pc.Level(1, num_latents=8, dim=64)]
        >>> encoder = pc.HierarchicalPerceiver(3, levels=levels, positions=pc.positions.LearnedGrid((500,), dim=32))
        >>> encoder(torch.randn(2, 500, 3)).shape
        torch.Size([2, 8, 64])

    Reference: Carreira et al. 2022 (Hierarchical Perceiver), section 3; skips between levels as in
    deepmind/hierarchical_perceiver, `perceiver.py`, `HiP`.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        levels: Sequence[Level],
        positions: Positions,
        decode: Sequence[Level] = (),
        cross_attention: Callable[..., nn.Module] = CrossAttend,
        latent_transformer: Callable[..., nn.Module] = LATENT_TRANSFORMER,
    ) -> None:
        super().__init__()
        checks.positive(input_dim=input_dim)
        if isinstance(positions, type) or not isinstance(positions, Positions):
            raise TypeError(f"positions must be an object such as positions.LearnedGrid((n,), dim=32); got {positions!r}")
        opposites = _opposites(levels, decode)
        self.input_dim, self.positions = input_dim, positions
        self.embed = init.linear(input_dim, positions.dim)
        widths = [positions.dim, *(level.dim for level in (*levels, *decode))]
        make = partial(GroupedRead, cross_attention=cross_attention, latent_transformer=latent_transformer)
        self.encoding = nn.ModuleList(make(width, level) for width, level in zip(widths, levels, strict=False))
        self.decoding = nn.ModuleList(
            make(width, level, skip_dim=opposite.dim)
            for width, level, opposite in zip(widths[len(levels) :], decode, opposites, strict=False)
        )
        self.level = [*levels, *decode][-1]
        self.dim = self.level.dim

    def forward(
        self, inputs: Tokens | Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """The latents of the last level, one group after the other.

        Args:
            inputs: tokens, or a tensor.
            mask: which of them are there, beside the tokens' own mask. What others hold has no effect, NaN included,
                but they have their places in the groups.

        Raises:
            TypeError: inputs of another dtype, a mask that is not boolean.
            ValueError: inputs of another width, rank or device, a mask of another shape.
        """
        x, mask = self._embedded(inputs, mask)
        kept = []
        for level in self.encoding:
            x, mask = level(x, mask=mask), None
            kept.append(x)
        for level, skip in zip(self.decoding, kept[-2::-1], strict=False):
            x = level(x, skip=skip)
        return x

    def places(self, inputs: Tokens | Float[Tensor, "b n c"]) -> Float[Tensor, "n p"]:
        """The position features of every token."""
        grid, like = (inputs.grid, inputs.content) if isinstance(inputs, Tokens) else (inputs.shape[1:-1], inputs)
        tables = self.positions.tables(tuple(grid), like=like)
        total = sum(tables[1:], start=tables[0])
        return total.expand(*grid, total.shape[-1]).flatten(0, -2)

    def _embedded(self, inputs: Tokens | Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens with their positions added, and which of them are there."""
        x = inputs.materialize() if isinstance(inputs, Tokens) else inputs
        checks.is_floating("inputs", x)
        checks.has_shape("inputs", x, "b n c", last=self.input_dim)
        checks.same_place("inputs", x, self.embed.weight)
        if mask is not None:
            checks.is_mask("mask", mask, x.shape[:-1])
        if isinstance(inputs, Tokens) and inputs.mask is not None:
            mask = inputs.flat_mask() if mask is None else mask & inputs.mask.flatten(1)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.embed(x) + self.places(inputs), mask


@register
class HierarchicalAutoencoder(nn.Module):
    """An answer for every token of the input: its position is a query, which reads the latents of its group.

    With a mask it is the paper's pretraining: of the tokens that are there, those that are not are made up.

    Args:
        perceiver: whose last level has the groups that the answer is made of.
        output_dim: the width of the answer; that of the input unless given.
        cross_attention: makes a cross-attend from (dim, input_dim, residual=False).

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from perceiver_core.models import HierarchicalAutoencoder
        >>> levels = [pc.Level(16, num_latents=4, dim=32), pc.Level(1, num_latents=8, dim=64)]
        >>> where = pc.positions.LearnedGrid((500,), dim=32)
        >>> perceiver = pc.HierarchicalPerceiver(3, levels=levels, positions=where, decode=levels[:1])
        >>> HierarchicalAutoencoder(perceiver)(torch.randn(2, 500, 3), mask=torch.rand(2, 500) < 0.15).shape
        torch.Size([2, 500, 3])

    Reference: Carreira et al. 2022 (Hierarchical Perceiver), masked auto-encoding;
    deepmind/hierarchical_perceiver, `perceiver_blocks.py`, `ReconstructionHead`.
    """

    def __init__(
        self,
        perceiver: HierarchicalPerceiver,
        output_dim: int | None = None,
        *,
        cross_attention: Callable[..., nn.Module] = CrossAttend,
    ) -> None:
        super().__init__()
        self.perceiver = perceiver
        width = perceiver.positions.dim
        self.cross_attention = cross_attention(width, perceiver.dim, residual=False)
        self.output = init.linear(width, perceiver.input_dim if output_dim is None else output_dim)

    def forward(
        self, inputs: Tokens | Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n o"]:
        """A vector for every token, whether it was there or not.

        Args:
            inputs: as those of `HierarchicalPerceiver`.
            mask: likewise.
        """
        groups, latents = self.perceiver.level.num_groups, self.perceiver(inputs, mask=mask)
        places = self.perceiver.places(inputs)
        queries = repeat(grouped(places.unsqueeze(0), groups), "g n p -> (b g) n p", b=latents.shape[0])
        answers = self.cross_attention(queries, rearrange(latents, "b (g z) d -> (b g) z d", g=groups))
        out: Tensor = rearrange(self.output(answers), "(b g) n o -> b (g n) o", g=groups)
        return F.pad(
            out, (0, 0, 0, places.shape[0] - out.shape[1])
        )  # cut off; a slice would bind a graph to its strides


def _opposites(levels: Sequence[Level], decode: Sequence[Level]) -> list[Level]:
    """The level that each decode level gets its skip from."""
    if not levels:
        raise ValueError("levels must name one at least; got none")
    opposites = list(levels)[-2::-1]
    if len(decode) > len(opposites):
        raise ValueError(f"decode must have at most {len(opposites)} levels, one less than levels; got {len(decode)}")
    for number, (level, opposite) in enumerate(zip(decode, opposites, strict=False)):
        if (level.num_groups, level.num_latents) != (opposite.num_groups, opposite.num_latents):
            raise ValueError(
                f"decode level {number} must have the groups and latents of the level opposite, {opposite.num_groups} x "
                f"{opposite.num_latents}; got {level.num_groups} x {level.num_latents}"
            )
    return opposites
